"""Log-probabilities as OpenAI's clients read them."""

from node.api.logprobs import LEAST, CompletionLogprobs, chat_logprobs
from node.api.service import TokenEvent
from tests.fakes import make_tokenizer

LOST, IMPOSSIBLE = TokenEvent(7, 5, None), TokenEvent(8, 6, float("-inf"))


def test_what_was_lost_with_a_node_is_null_and_not_certainty() -> None:
    tokenizer = make_tokenizer()
    chat = chat_logprobs(tokenizer, [LOST, IMPOSSIBLE], 2)["content"]
    assert [entry["logprob"] for entry in chat] == [None, LEAST]
    assert chat[0]["top_logprobs"] == []
    entries = CompletionLogprobs(tokenizer, 2).tokens([LOST, IMPOSSIBLE])
    assert entries["token_logprobs"] == [None, LEAST]
    assert entries["top_logprobs"][0] is None
