"""What the reward model is asked, what is read from it, and that no reward peeks at references."""

import dataclasses
import types

import numpy as np
import pytest

from spark_jax.data.records import Problem, SamplingSettings
from spark_jax.rewards import prm
from spark_jax.rewards.records import NOT_CALLED, Judgement, Reward, RewardInputs

PROBLEM = Problem("p", "what?", "the reference")


class RewardModel:
    """Gives the texts it was made with, in order, and remembers what it was asked."""

    def __init__(self, *texts):
        self.texts, self.prompts, self.calls = list(texts), [], 0

    def __call__(self, prompts, *, samples_per_prompt, settings, seed):
        assert samples_per_prompt == 1
        assert settings.greedy
        assert settings.max_new_tokens == 77
        assert seed == 5
        self.calls += 1
        self.prompts += prompts
        answers = self.texts[: len(prompts)]
        return [[types.SimpleNamespace(text=text, finished=True)] for text in answers]


def ask(model, text_format, responses, kind="prm", **more):
    settings = SamplingSettings(max_new_tokens=77)
    problems = [PROBLEM] * len(responses)
    return prm.judge(model, text_format, problems, responses, kind, settings, 5, **more)


def rewards(name, text_format, responses, judged):
    problems = [PROBLEM] * len(responses)
    return prm.REWARDS[name](
        RewardInputs(problems, responses, 1, text_format, judged.format_ok, judged.judgements)
    ).tolist()


def test_only_responses_that_keep_the_format_are_judged(text_format, respond):
    responses = [respond("1"), "broken", respond("2"), respond("3") + " appended"]
    model = RewardModel("1: ok 2: ok 3: bad overall: Yes", "1: ok 2: ok 3: ok overall: No")
    judged = ask(model, text_format, responses)
    assert model.calls == 1
    assert [prompt.rpartition("|")[2] for prompt in model.prompts] == [responses[0], responses[2]]
    assert judged.format_ok.tolist() == [True, False, True, False]
    assert [j.called for j in judged.judgements] == [True, False, True, False]
    assert [j.overall for j in judged.judgements] == [True, False, False, False]
    assert judged.verdicts[:, :4].tolist() == [[1, 1, -1, 0], [0] * 4, [1, 1, 1, 0], [0] * 4]
    assert judged.verdicts.shape == (4, 20)
    assert not judged.verdicts[:, 4:].any()
    assert judged.num_steps.tolist() == [3, 0, 3, 3]
    metrics = judged.metrics
    assert metrics["reward_model/called"] == 0.5
    assert metrics["reward_model/yes"] == 0.5
    assert metrics["reward_model/steps_correct"] == 5 / 6
    assert metrics["format/failed"] == 0.5
    assert metrics["hacking/appended_after_answer"] == 0.25


def test_with_a_check_switched_off_the_appended_text_is_still_not_shown(text_format, respond):
    response = respond("3") + " appended <step> x </step>"
    model = RewardModel("1: ok 2: ok 3: ok overall: Yes")
    judged = ask(model, text_format, [response], checks=["one_boxed", "one_answer_block"])
    assert model.prompts[0].endswith("</answer>")
    assert judged.num_steps.tolist() == [3]
    assert rewards("step_average", text_format, [response], judged) == [1.0]
    assert judged.metrics["hacking/appended_after_answer"] == 1


def test_the_reward_model_is_not_called_for_nothing(text_format):
    model = RewardModel()
    judged = ask(model, text_format, ["broken"] * 2)
    assert model.calls == 0
    assert rewards("process_aware_outcome", text_format, ["broken"] * 2, judged) == [0, 0]
    assert judged.metrics["reward_model/yes"] == 0
    assert ask(model, text_format, []).verdicts.shape == (0, 20)


def test_the_reference_is_not_in_the_prompt(text_format, respond):
    model = RewardModel("overall: Yes")
    ask(model, text_format, [respond("1")], kind="orm")
    assert "what?" in model.prompts[0]
    assert "reference" not in model.prompts[0]


@pytest.mark.parametrize(
    ("num_steps", "judgement", "outcome", "average"),
    [
        (4, "1: ok 2: ok 3: ok 4: bad overall: Yes", 1, 0.4 * 0.75 + 0.6),
        (4, "1: ok 2: ok 3: ok 4: bad overall: No", 0, 0.3),
        (3, "1: bad 2: bad 3: bad overall: Yes", 1, 0.6),
        (3, "1: ok 2: ok overall: Yes", 1, 0.6),  # judged another number of steps
        (3, "1: ok 2: ok 3: ok 4: ok overall: No", 0, 0.0),
        (3, "overall: Yes", 1, 0.6),
        (2, "1: ok 2: ok overall: Yes", 1, 0.6),  # too few
        (20, "1: ok " * 20 + "overall: Yes", 1, 1.0),
        (21, "1: ok " * 21 + "overall: Yes", 1, 0.6),  # too many
        (3, "1: ok 2: ok 3: ok overall: Maybe", 0, 0.0),  # cannot be read
        (3, "", 0, 0.0),
    ],
)
def test_process_rewards(text_format, respond, num_steps, judgement, outcome, average):
    responses = [respond("1", num_steps)]
    judged = ask(RewardModel(judgement), text_format, responses)
    assert rewards("process_aware_outcome", text_format, responses, judged) == [outcome]
    got = rewards("step_average", text_format, responses, judged)
    np.testing.assert_allclose(got, [average], rtol=1e-6)
    step_part_counts = average not in (0.6, 0.0) or "bad 3: bad" in judgement
    assert judged.verdicts.any() == step_part_counts


def test_failures_are_counted_by_what_they_are(text_format, respond):
    texts = ["1: ok 2: ok 3: ok overall: No", "1: ok overall: Yes", "gibberish", "1: ok"]
    judged = ask(RewardModel(*texts), text_format, [respond("1")] * 4)
    assert [j.failure for j in judged.judgements] == [None, None, *["missing_overall"] * 2]
    assert judged.metrics["reward_model/unparseable"] == 0.5
    assert judged.metrics["reward_model/other_step_count"] == 0.25
    assert judged.metrics["reward_model/yes"] == 0.25


def test_a_judgement_is_parsed_once_whatever_its_number_of_steps(text_format, respond):
    parses = []

    def parse(kind, text, num_steps):
        parses.append(text)
        return text_format.parse_judgement(kind, text, num_steps)

    counting = dataclasses.replace(text_format, parse_judgement=parse)
    texts = ["1: ok " * n + "overall: Yes" for n in (3, 9, 0, 150)] + ["1: ok 2: bad"]
    judged = ask(RewardModel(*texts), counting, [respond("1")] * len(texts))
    assert parses == texts
    assert [j.overall for j in judged.judgements] == [True] * 4 + [False]
    assert [j.judged_every_step for j in judged.judgements] == [True] + [False] * 4
    assert [j.failure for j in judged.judgements] == [None] * 4 + ["missing_overall"]
    assert judged.metrics["reward_model/other_step_count"] == 3 / 5


def test_several_judgements_of_any_text_are_sampled_as_asked(text_format, respond):
    settings = SamplingSettings(temperature=0.3, max_new_tokens=9)
    calls = []

    def sample(prompts, **arguments):
        calls.append((prompts, arguments))
        answers = ["1: ok overall: Yes", "1: bad overall: No"]
        return [[types.SimpleNamespace(text=text) for text in answers] for _ in prompts]

    texts = ["broken", respond("1", 1) + " more"]
    got = prm.ask(sample, text_format, [PROBLEM] * 2, texts, "prm", settings, 8, votes=2)
    (prompts, arguments), *rest = calls
    assert not rest
    assert arguments == {"samples_per_prompt": 2, "settings": settings, "seed": 8}
    assert [prompt.rpartition("|")[2] for prompt in prompts] == texts
    assert not any("the reference" in prompt for prompt in prompts)
    assert [[j.verdicts for j in group] for group in got] == [[(True,), (False,)]] * 2
    assert [[j.judged_every_step for j in group] for group in got] == [[False] * 2, [True] * 2]


def test_orm(text_format, respond):
    responses = [respond("1"), respond("2"), respond("3")]
    judged = ask(RewardModel("overall: Yes", "overall: No", "?"), text_format, responses, "orm")
    assert rewards("orm", text_format, responses, judged) == [1, 0, 0]
    assert judged.metrics["reward_model/other_step_count"] == 0
    assert not judged.verdicts.any()


def test_a_response_with_more_steps_than_the_matrix_is_wide_has_no_verdicts(text_format, respond):
    texts = ["1: ok " * n + "overall: Yes" for n in (4, 5)]
    responses = [respond("1", 4), respond("1", 5)]
    judged = ask(RewardModel(*texts), text_format, responses, max_steps=4)
    assert judged.verdicts.tolist() == [[1] * 4, [0] * 4]


def test_a_reward_refuses_judgements_of_the_wrong_kind_or_none(text_format, respond):
    def batch(judgements):
        return RewardInputs([PROBLEM], [respond("1")], 1, text_format, np.ones(1, bool), judgements)

    with pytest.raises(ValueError, match=r"needs a reward model of kind .*got \['orm'\]"):
        prm.REWARDS["step_average"](batch([Judgement("orm", 3, True)]))
    with pytest.raises(ValueError, match=r"needs a reward model of kind \('orm',\), got \['prm'\]"):
        prm.REWARDS["orm"](batch([Judgement("prm", 3, True, (True,) * 3)]))
    with pytest.raises(ValueError, match="needs judgements"):
        prm.REWARDS["process_aware_outcome"](batch(None))


def test_a_reward_model_that_gives_too_few_texts_is_an_error(text_format, respond):
    with pytest.raises(ValueError, match=r"votes=1 were asked for of each"):
        ask(RewardModel("overall: Yes"), text_format, [respond("1")] * 2)
    with pytest.raises(ValueError, match="1 problems for 2 responses"):
        prm.judge(
            RewardModel(), text_format, [PROBLEM], ["a", "b"], "orm", SamplingSettings(), seed=0
        )


class Guarded(Problem):
    """A problem whose reference must not be read."""

    def __getattribute__(self, name):
        if name == "answer":
            raise AssertionError("the reference was read")
        return super().__getattribute__(name)


def test_only_rule_based_reads_the_reference(text_format, respond):
    responses = [respond("1"), respond("1"), respond("2"), "broken"]
    problems = [Guarded("p", "q", "1")] * 4
    readers = set()
    for name, reward in prm.REWARDS.items():
        kind = (reward.judges or ("prm",))[-1]
        model = RewardModel(*["1: ok 2: bad 3: ok overall: Yes"] * 3)
        settings = SamplingSettings(max_new_tokens=77)
        judged = prm.judge(model, text_format, problems, responses, kind, settings, 5)
        batch = RewardInputs(
            problems, responses, 2, text_format, judged.format_ok, judged.judgements
        )
        try:
            reward(batch)
        except AssertionError as error:
            assert "reference was read" in str(error)  # noqa: PT017
            readers.add(name)
    declared = {name for name, reward in prm.REWARDS.items() if reward.references}
    assert readers == declared == {"rule_based"}


def test_a_reward_is_handed_references_only_where_it_says_that_it_reads_them(text_format, respond):
    def reads(batch):
        return np.array([problem.answer is not None for problem in batch.problems], np.float32)

    problems = [Problem("p", "q", "1")] * 2
    batch = RewardInputs(problems, [respond("1")] * 2, 2, text_format, np.ones(2, bool))
    assert Reward(reads)(batch).tolist() == [0, 0]
    assert Reward(reads, references=True)(batch).tolist() == [1, 1]


def test_the_rows_of_a_batchs_groups(text_format, respond):
    responses = [respond(str(n)) for n in range(6)]
    batch = RewardInputs([PROBLEM] * 6, responses, 2, text_format, np.arange(6) % 2 == 0)
    part = batch.of_groups(1, 3)
    assert list(part.responses) == responses[2:]
    assert part.format_ok.tolist() == [True, False] * 2


def test_every_reward_is_zero_where_the_format_is_broken(text_format, respond):
    responses = [respond("1")] * 4
    ok = np.array([True, False, True, False])
    for name, reward in prm.REWARDS.items():
        kind = (reward.judges or ("prm",))[0]
        verdicts = () if kind == "orm" else (True,) * 3
        judgements = [Judgement(kind, 3, True, verdicts)] * 4
        problems = [Problem("p", "q", "1")] * 4
        got = reward(RewardInputs(problems, responses, 2, text_format, ok, judgements, seed=3))
        assert got.dtype == np.float32
        assert got[1] == got[3] == 0
        if name != "random":
            assert got[0] == got[2] == 1


def test_disagreement():
    judgements = [
        Judgement("orm", 3, True),
        Judgement("orm", 3, True),
        Judgement("orm", 3, False),
        Judgement("orm", 3, False),
        Judgement("orm", 3, False, (), NOT_CALLED),
    ]
    got = prm.disagreement(judgements, np.array([True, False, False, False, True]))
    assert got == {
        "reward_model/disagreement": 0.25,
        "reward_model/false_yes": 1 / 3,
        "reward_model/false_no": 0.0,
    }
