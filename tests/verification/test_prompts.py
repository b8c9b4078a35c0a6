import itertools

import pytest

from spark_jax.data.formats import REWARD_KINDS
from spark_jax.data.records import ParseFailure, Problem
from spark_jax.steps import blank_line_steps, numbered_steps
from spark_jax.verification.parse import format_verification
from spark_jax.verification.prompts import (
    CANONICAL,
    PROMPT_PLACEHOLDERS,
    canonical_format,
    number_steps,
)

PROBLEM = Problem("p", "What is $3+4$? ${problem}", "SECRET 7")
SOLUTION = (
    "<think>\n<step> 3+4=7 </step>\n<step>So 7.</step>\n</think>\n<answer> \\boxed{7} </answer>"
)
VERIFICATION = format_verification([("a", "ok"), ("b", "ok")], [True, True], True)


def all_prompts(text_format, problem=PROBLEM, reference="REF 7"):
    return {
        "solve": text_format.solve_prompt(problem),
        "verify": text_format.verify_prompt(problem, SOLUTION, None),
        "verify_with_reference": text_format.verify_prompt(problem, SOLUTION, reference),
        "critique": text_format.critique_prompt(problem, SOLUTION, VERIFICATION),
        "merge": text_format.merge_prompt(problem, SOLUTION, VERIFICATION, "step 1 is $ wrong"),
        **{kind: text_format.reward_prompt(kind, problem, SOLUTION) for kind in REWARD_KINDS},
    }


def test_every_prompt_shows_what_it_is_about_and_only_that():
    prompts = all_prompts(CANONICAL)
    assert set(prompts) == set(PROMPT_PLACEHOLDERS)
    for name, prompt in prompts.items():
        assert PROBLEM.question in prompt  # a $ in a value is no placeholder
        assert ("Step 1: 3+4=7 </step>" in prompt) == (name != "solve")
        assert (VERIFICATION in prompt) == (name in ("critique", "merge"))
        assert ("step 1 is $ wrong" in prompt) == (name == "merge")
        assert ("REF 7" in prompt) == (name == "verify_with_reference")
        assert "SECRET" not in prompt
        assert prompt == prompt.rstrip("\n")


def test_reward_prompts_end_as_the_method_page_says():
    prompts = all_prompts(CANONICAL)
    assert prompts["orm"].endswith("Is the answer correct (Yes/No)?")
    assert prompts["prm"].endswith("Let's verify step by step.")
    assert prompts["prm_cot"].endswith("Let's verify step by step.")


def test_the_form_that_prompts_ask_for_is_the_form_that_is_read():
    """The example in each verification prompt, filled in, is a valid verification."""
    for name in ("verify", "verify_with_reference", "merge"):
        prompt = all_prompts(CANONICAL)[name].replace(VERIFICATION, "")
        example = prompt[prompt.index("## Step 1") :]
        lines = [
            line for line in example.split("\n") if line.startswith(("##", "**This", "**Verif"))
        ]
        assert len(lines) == 4
        text = "\n".join([lines[0], lines[2], lines[0].replace("1", "2"), lines[1], lines[3]])
        parsed = CANONICAL.parse_verification(text, 2)
        assert not isinstance(parsed, ParseFailure), parsed
        assert (parsed.verdicts, parsed.overall) == ((False, True), True)
    solve = all_prompts(CANONICAL)["solve"]
    response = solve[solve.index("<think>") : solve.index("</answer>") + len("</answer>")]
    assert len(CANONICAL.split_steps(response)) == 2
    assert CANONICAL.final_answer(response) == "your final answer"


def test_steps_are_numbered_and_nothing_else_is_changed():
    numbered = number_steps(SOLUTION)
    assert numbered.count("Step ") == 2
    assert numbered.replace("Step 1: ", "").replace("Step 2: ", "") == SOLUTION
    assert number_steps("no steps here") == "no steps here"


@pytest.mark.parametrize(
    ("split_steps", "solution", "shown"),
    [
        (numbered_steps, "1. add\n2. stop", "Step 1: 1. add\nStep 2: 2. stop"),
        (numbered_steps, "## Step 1: add\n## Step 2: stop", "## Step 1: add\n## Step 2: stop"),
        (blank_line_steps, "Add.\n\nStep 1 gave 7.", "Step 1: Add.\n\nStep 2: Step 1 gave 7."),
    ],
)
def test_another_splitter_numbers_the_steps_its_own_way(tmp_path, split_steps, solution, shown):
    (tmp_path / "verify.txt").write_text("${problem}|${solution}|${num_steps}")
    (tmp_path / "prm.txt").write_text("${problem}|${solution}|${num_steps}")
    own = canonical_format(tmp_path, split_steps)
    assert len(own.split_steps(solution)) == 2
    expected = f"{PROBLEM.question}|{shown}|2"
    assert own.verify_prompt(PROBLEM, solution, None) == expected
    assert own.reward_prompt("prm", PROBLEM, solution) == expected
    assert "with its 0 steps" in CANONICAL.verify_prompt(PROBLEM, solution, None)


def test_the_verifier_is_told_the_reading_by_which_the_world_labels():
    for name in ("verify", "verify_with_reference"):
        prompt = all_prompts(CANONICAL)[name]
        assert "follows correctly from an earlier wrong value is itself correct" in prompt
        assert "rests on an earlier error" not in prompt


def test_only_what_belongs_to_a_verification_is_shown_to_the_critic():
    noisy = f"<think>draft</think>{VERIFICATION}\nThat is all."
    assert CANONICAL.critique_prompt(PROBLEM, SOLUTION, noisy) == CANONICAL.critique_prompt(
        PROBLEM, SOLUTION, VERIFICATION
    )


def test_user_files_replace_shipped_prompts_one_by_one(tmp_path):
    (tmp_path / "verify.txt").write_text("Prüfe $$x$$: ${problem} ${solution} (${num_steps})\n")
    (tmp_path / "notes.md").write_text("not a prompt")
    own, shipped = all_prompts(canonical_format(tmp_path)), all_prompts(CANONICAL)
    assert own["verify"] == f"Prüfe $x$: {PROBLEM.question} {number_steps(SOLUTION)} (2)"
    del own["verify"], shipped["verify"]
    assert own == shipped


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("${problem}", r"missing placeholders \['solution'\]"),
        ("${problem} ${solution} ${refrence}", r"unknown placeholders \['refrence'\]"),
        ("${problem} ${solution} ${reference}", r"unknown placeholders \['reference'\]"),
        ("${problem} ${solution} costs 5$ or $5", r"write \$\$ for a dollar sign"),
    ],
)
def test_bad_placeholders_are_refused_with_the_file_name(tmp_path, text, complaint):
    (tmp_path / "verify.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"verify\.txt: .*{complaint}"):
        canonical_format(tmp_path)


def test_bad_prompt_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no prompt file"):
        canonical_format(tmp_path)
    with pytest.raises(ValueError, match="not a directory"):
        canonical_format(tmp_path / "absent")
    (tmp_path / "verfy.txt").write_text("${problem} ${solution}")
    with pytest.raises(ValueError, match=r"verfy\.txt.*expected any of .*verify\.txt"):
        canonical_format(tmp_path)


def test_answers_are_compared_by_value():
    for a, b in itertools.permutations(["1/2", r"\frac{1}{2}", "0.5"], 2):
        assert CANONICAL.same_answer(a, b)
    assert not CANONICAL.same_answer("1/2", "1/3")
    assert not CANONICAL.same_answer(None, None)
