"""The demo model's factory: what is drawn twice is the same, what is examined was never taught, what is saved opens."""

import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from demo_model import chats, exam, muon, passages, plant, styles, tokenizer, train, words  # noqa: E402
from demo_model.decoder import Decoder  # noqa: E402
from demo_model.export import export, to_transformers  # noqa: E402


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return tokenizer.train_tokenizer(seed=3, chats=800)


def draw(seed: int, count: int = 300) -> list[chats.Chat]:
    rng = random.Random(seed)
    return [chats.make_chat(rng, number / count) for number in range(count)]


def tiny(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def shaken(decoder: Decoder) -> Decoder:
    """With outputs that are not silent, so that every layer counts."""
    torch.manual_seed(1)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def test_one_seed_gives_one_course() -> None:
    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_one_seed_gives_one_examination() -> None:
    assert exam.reading_items(1) == exam.reading_items(1)
    assert exam.reading_items(exam.EXAM_SEED) != exam.reading_items(exam.DEV_SEED)


def test_every_chat_ends_with_an_answer_that_is_learnt() -> None:
    for chat in draw(7):
        assert chat[-1].role == "assistant"
        assert chat[-1].weight > 0
        assert all(turn.weight == 0 for turn in chat if turn.role != "assistant")


def test_examined_names_places_and_numbers_are_never_taught() -> None:
    """The split is by value: nothing that the examination's world gives out is given out in training."""
    for kind in ("person", "place", "number", "age", "code"):
        taught = {words.World(random.Random(seed)).draw(kind) for seed in range(1500)}
        examined = {words.World(random.Random(seed), exam=True).draw(kind) for seed in range(300)}
        assert not taught & examined, kind


def test_examined_answers_are_in_the_prompt_and_not_in_training_passages() -> None:
    taught = " ".join(turn.text for chat in draw(9, 1500) for turn in chat)
    for item in exam.reading_items(exam.EXAM_SEED):
        answer = item.answer.rstrip(".")
        if item.kind in ("person", "place"):
            assert answer in item.chat[-1].text
            assert f" {answer}." not in taught
        if item.kind == "unknown":
            assert item.answer == passages.UNKNOWN


def test_the_examination_asks_each_kind_equally_often() -> None:
    items = exam.reading_items(exam.EXAM_SEED)
    assert len(items) == 200
    assert {sum(item.kind == kind for item in items) for kind in exam.KINDS} == {28, 29}


@pytest.mark.parametrize(
    ("answer", "word"),
    [("A lamp.", "Lamp."), ("Mira Tolan.", "Mira."), ("Hello! How can I help you?", "Hello."), ("47.", "47.")],
)
def test_one_word(answer: str, word: str) -> None:
    assert styles.one_word(answer) == word


@pytest.mark.parametrize(
    "text", ["Mira lives in Tolbek.", "  two  spaces\n\nand lines", "Grüße, 你好 🙂", '{"a": [1, 2.5]}', ""]
)
def test_text_survives_the_tokenizer(bpe: PreTrainedTokenizerFast, text: str) -> None:
    assert bpe.decode(bpe.encode(text, add_special_tokens=False)) == text


def test_a_name_has_the_same_tokens_wherever_it_stands(bpe: PreTrainedTokenizerFast) -> None:
    start, inside = bpe.tokenize("Tolbekholm"), bpe.tokenize("in Tolbekholm")
    assert inside[-len(start) :] == start


def test_training_rows_are_laid_out_as_the_chat_template_says(bpe: PreTrainedTokenizerFast) -> None:
    for chat in draw(11, 60):
        messages = [{"role": turn.role, "content": turn.text} for turn in chat]
        ids, weights = tokenizer.encode(bpe, chat)
        assert bpe.apply_chat_template(messages, return_dict=False) == ids
        assert len(weights) == len(ids)
        assert weights[-1] > 0  # the end token is learnt


def test_a_prompt_ends_where_the_answer_begins(bpe: PreTrainedTokenizerFast) -> None:
    text = bpe.apply_chat_template([{"role": "user", "content": "Hi "}], tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>Hi<|end|><|assistant|>"


def test_the_training_decoder_is_transformers_llama() -> None:
    decoder = shaken(Decoder(tiny(2), layers=2))
    ids = torch.arange(24).view(2, 12) % 64
    theirs = to_transformers(decoder).eval()(ids).logits
    torch.testing.assert_close(decoder.logits(decoder.hidden(ids)), theirs, rtol=1e-4, atol=1e-4)


def test_growing_keeps_the_function() -> None:
    decoder = shaken(Decoder(tiny(4), layers=2))
    ids = torch.arange(10).view(1, 10)
    before = decoder.hidden(ids)
    decoder.grow()
    assert len(decoder.model.layers) == 4
    torch.testing.assert_close(decoder.hidden(ids), before)


def test_the_planted_start_copies_tokens_it_was_never_trained_on(bpe: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    decoder = Decoder(train.config(bpe), layers=4)
    plant.plant(decoder)
    words_ = torch.randint(6, 600, (8, 30))
    twice = torch.cat([torch.ones(8, 1, dtype=torch.long), words_, words_], dim=1)
    said = decoder.logits(decoder.hidden(twice[:, :-1])).argmax(-1)[:, -29:]
    assert (said == words_[:, 1:]).float().mean() > 0.9


def test_muon_makes_updates_orthogonal() -> None:
    singular = torch.linalg.svdvals(muon.orthogonal(torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))))
    assert singular.min() > 0.5
    assert singular.max() < 1.5


def test_training_checkpoints_resumes_and_exports(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    plan = train.Plan(minutes=0.004, batch=256, pool=8)
    trainer = train.Trainer(bpe, plan, seed=0, work=tmp_path)
    trainer.dev = trainer.dev[:2]
    published: list[Decoder] = []
    trainer.run(published.append)
    assert trainer.progress == 1.0

    again = train.Trainer(bpe, plan, seed=0, work=tmp_path)
    again.resume()
    assert again.tokens == trainer.tokens > 0
    weights = again.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())

    export(published[-1], bpe, tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert opened.config.num_hidden_layers == 8
    assert opened.generate(**prompt, max_new_tokens=2).shape[1] <= prompt["input_ids"].shape[1] + 2


def test_the_shipped_model_opens_and_fits() -> None:
    folder = ROOT / "models" / "demo"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20e6
    shipped = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    text = shipped.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>Be kind.<|end|><|user|>Hello<|end|><|assistant|>"
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == shipped.eos_token_id
