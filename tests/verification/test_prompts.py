import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from spark_jax.data.formats import REWARD_KINDS
from spark_jax.data.records import ParseFailure, Problem
from spark_jax.response_format import format_ok
from spark_jax.steps import blank_line_steps, numbered_steps, tagged_steps
from spark_jax.verification.parse import format_verification
from spark_jax.verification.prompts import (
    CANONICAL,
    PROMPT_PLACEHOLDERS,
    canonical_format,
    number_steps,
    rubric_format,
)

PROBLEM = Problem("p", "What is $3+4$? ${problem}", "SECRET 7")
SOLUTION = (
    "<think>\n<step> 3+4=7 </step>\n<step>So 7.</step>\n</think>\n<answer> \\boxed{7} </answer>"
)
VERIFICATION = format_verification([("a", "ok"), ("b", "ok")], [True, True], True)
PROMPTS = Path(__file__).parents[2] / "configs" / "prompts"
RUBRIC = "1. It is $short$.\n2. It ends with ${a} stop."
TASK = Problem("t", "Decline the invitation.", metadata={"rubric": RUBRIC})


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
    assert {*prompts, "response_format"} == set(PROMPT_PLACEHOLDERS)
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


@pytest.mark.parametrize("make", [canonical_format, rubric_format])
@pytest.mark.parametrize("split_steps", [tagged_steps, numbered_steps, blank_line_steps])
def test_the_form_that_the_policy_is_asked_for_is_the_form_that_is_read(make, split_steps):
    """The example response in the prompt keeps every constraint, and its two steps are found."""
    text_format = make(split_steps=split_steps)
    solve = text_format.solve_prompt(TASK)
    response = solve[solve.index("<think>") : solve.index("</answer>") + len("</answer>")]
    assert format_ok(response)
    steps = [response[a:b] for a, b in text_format.split_steps(response)]
    assert len(steps) == 2
    assert all(f"your {name} step" in step for name, step in zip(("first", "second"), steps))
    assert text_format.final_answer(response) == "your final answer"
    others = {tagged_steps, numbered_steps, blank_line_steps} - {split_steps}
    assert all(len(other(response)) != 2 for other in others)  # it asks for these and no others


def test_a_splitter_of_ones_own_is_asked_for_by_a_file_of_ones_own(tmp_path):
    def by_line(text):
        return [(m.start(), m.end()) for m in re.finditer(r"\S.*", text)]

    (tmp_path / "response_format.txt").write_text("One step a line, $$5 each.\n")
    for split_steps in (by_line, numbered_steps):
        solve = canonical_format(tmp_path, split_steps).solve_prompt(PROBLEM)
        assert "\n\nOne step a line, $5 each.\n\n" in solve
        assert "<think>" not in solve
    assert "<step>" in canonical_format(None, by_line).solve_prompt(PROBLEM)


def test_the_rubric_is_shown_to_whoever_judges_by_it_and_to_no_policy():
    text_format = rubric_format()
    prompts = {
        "solve": text_format.solve_prompt(TASK),
        "verify": text_format.verify_prompt(TASK, SOLUTION, None),
        "critique": text_format.critique_prompt(TASK, SOLUTION, VERIFICATION),
        "merge": text_format.merge_prompt(TASK, SOLUTION, VERIFICATION, "CRITIQUE"),
        **{kind: text_format.reward_prompt(kind, TASK, SOLUTION) for kind in REWARD_KINDS},
    }
    for name, prompt in prompts.items():
        assert TASK.question in prompt
        assert (RUBRIC in prompt) == (name != "solve")
        assert ("Step 2: So 7.</step>" in prompt) == (name != "solve")
        assert (VERIFICATION in prompt) == (name in ("critique", "merge"))
        assert "${" not in prompt.replace(RUBRIC, "")
    for name in ("verify", "merge"):  # the form is the canonical one, so the same parser reads it
        shown = CANONICAL.verify_prompt(PROBLEM, SOLUTION, None)
        form = shown[shown.index("## Step 1") : shown.index("or, where")]
        assert form in prompts[name]
        assert "**Verification: Is the answer correct (Yes/No)? Yes**" in prompts[name]


def test_what_a_rubric_prompt_cannot_be_made_of_is_refused():
    text_format = rubric_format()
    for metadata in ({}, {"rubric": " "}, {"rubric": ["a"]}):
        bare = dataclasses.replace(TASK, metadata=metadata)
        with pytest.raises(ValueError, match="problem 't' has no rubric"):
            text_format.verify_prompt(bare, SOLUTION, None)
    with pytest.raises(ValueError, match="no references"):
        text_format.verify_prompt(TASK, SOLUTION, "7")


def test_rubric_prompts_are_replaced_and_checked_too(tmp_path):
    (tmp_path / "solve.txt").write_text("${problem} (${rubric})")
    assert rubric_format(tmp_path).solve_prompt(TASK) == f"{TASK.question} ({RUBRIC})"
    with pytest.raises(ValueError, match=r"unknown placeholders \['rubric'\]"):
        canonical_format(tmp_path)
    (tmp_path / "orm.txt").write_text("${problem} ${solution}")
    with pytest.raises(ValueError, match=r"orm\.txt: missing placeholders \['rubric'\]"):
        rubric_format(tmp_path)
    (tmp_path / "orm.txt").rename(tmp_path / "verify_with_reference.txt")
    with pytest.raises(ValueError, match=r"unknown prompt files .*verify_with_reference"):
        rubric_format(tmp_path)


def test_free_texts_are_the_same_word_by_word():
    same = rubric_format().same_answer
    assert same("Dear Ann,\n  no.", "Dear Ann, no. ")
    for a, b in [("no", "No"), (None, None), ("", ""), ("a", None)]:
        assert not same(a, b)
        assert not same(b, a)


def test_prompts_end_where_the_answer_begins():
    """A base model goes on writing: the last line must ask for the text wanted next."""
    ends = {"solve": "Response:", "critique": "Critique:", "merge": "Final verification:"}
    ends |= dict.fromkeys(("verify", "verify_with_reference"), "Verification:")
    prompts = all_prompts(CANONICAL)
    for name, end in ends.items():
        assert prompts[name].splitlines()[-1] == end


def test_the_readme_names_every_shipped_file_and_placeholder():
    readme = (PROMPTS / "README.md").read_text()
    for file in PROMPTS.rglob("*.txt"):
        assert f"`{file.name}`" in readme or f"`{file.parent.name}/`" in readme, file
    for name in frozenset.union(*PROMPT_PLACEHOLDERS.values()) | {"rubric", "num_steps"}:
        assert f"`${{{name}}}`" in readme
