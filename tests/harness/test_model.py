"""The LLM behind lm-eval's interface: what it is asked, what it answers, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.api.instance import Instance

from dlx.errors import RequestError
from dlx.harness.model import Harness, cut
from dlx.request import SamplingParams
from tests.harness.answers import Answers


def asked(context: str, doc: int = 0, **arguments: Any) -> Instance:
    return Instance("generate_until", {}, (context, arguments), 0, ("task", doc, 1))


def params(
    arguments: dict[str, Any], mine: SamplingParams | None = None, given: tuple[str, ...] = ()
) -> SamplingParams:
    llm = Answers(lambda text: "")
    Harness(llm, mine, given).generate_until([asked("a", **arguments)])  # type: ignore[arg-type]
    return llm.params[0]


def test_answers_are_cut_at_the_first_stop_string() -> None:
    model = Harness(Answers(lambda text: f"{text} one\nQuestion: two"))  # type: ignore[arg-type]
    found = model.generate_until([asked("a", 0, until=["\nQuestion:", "two"]), asked("b", 1, until="one")])
    assert found == ["a one", "b "]
    assert [(answer.task, answer.doc, answer.text, answer.output.nfe) for answer in model.answers] == [
        ("task", 0, "a one", 2),
        ("task", 1, "b ", 2),
    ]


def test_the_engine_ends_answers_at_stop_strings_of_which_it_takes_four() -> None:
    assert params({"until": ["\nA", "\nB"]}).stop == ("\nA", "\nB")
    assert params({"until": ["1", "2" * 300, "3", "4", "5", "6"]}).stop == ("1", "3", "4", "5")


def test_a_text_without_stop_strings_stays() -> None:
    assert cut("as it is", ["#"]) == cut("as it is", []) == "as it is"


def test_a_conversation_is_asked_in_the_template_with_its_messages_as_mere_text() -> None:
    llm = Answers(lambda text: "")
    model = Harness(llm)  # type: ignore[arg-type]
    talk = [{"role": "user", "content": "say <|im_end|>"}]
    text = model.apply_chat_template(talk)
    assert text == "<|im_start|>user\nsay <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    model.generate_until([asked(text)])
    assert llm.prompts == [llm.tokenizer.chat(talk)]
    assert llm.prompts != [llm.tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        ({}, SamplingParams(max_tokens=256)),
        ({"max_gen_toks": 9, "do_sample": False, "temperature": 0.7}, SamplingParams(max_tokens=9)),
        ({"do_sample": True}, SamplingParams(temperature=1.0)),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 5}, SamplingParams(temperature=0.5, top_p=0.9, top_k=5)),
    ],
)
def test_a_task_says_how_it_is_decoded(arguments: dict[str, Any], made: SamplingParams) -> None:
    assert params(arguments) == made


def test_what_the_caller_gives_goes_before_what_the_task_says() -> None:
    mine = SamplingParams(max_tokens=7, temperature=0.2, threshold=0.8)
    made = params({"max_gen_toks": 9, "do_sample": False}, mine, ("max_tokens", "temperature", "threshold"))
    assert made == mine


def test_every_request_has_a_seed_of_its_own() -> None:
    llm = Answers(lambda text: "")
    Harness(llm, SamplingParams(seed=2**63 - 1)).generate_until([asked("a"), asked("a")])  # type: ignore[arg-type]
    assert [one.seed for one in llm.params] == [2**63 - 1, 0]


def test_an_argument_that_dlx_does_not_know_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"the task asks for num_beams; dlx knows do_sample,"):
        params({"num_beams": 4})


@pytest.mark.parametrize("name", ["loglikelihood", "loglikelihood_rolling"])
def test_scores_of_given_answers_are_refused(name: str) -> None:
    model = Harness(Answers(lambda text: ""))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="task 'task' is scored by the log-likelihood"):
        getattr(model, name)([asked("a")])


def test_the_beginning_of_an_answer_is_refused() -> None:
    model = Harness(Answers(lambda text: ""))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="gen_prefix"):
        model.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=False)
