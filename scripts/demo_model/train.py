"""The training loop: one CPU core, a clock for a schedule, a checkpoint every few minutes."""

import copy
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from demo_model.chats import Turn, make_chat
from demo_model.decoder import Decoder
from demo_model.exam import DEV_SEED, Item, reading_items
from demo_model.export import export
from demo_model.muon import optimizers
from demo_model.plant import plant
from demo_model.tokenizer import encode, load_tokenizer, train_tokenizer

CHECKPOINT = "checkpoint.safetensors"
COUNTS = {"elapsed": float, "tokens": int, "steps": int, "pools": int, "best": float}


@dataclass(frozen=True)
class Plan:
    minutes: float = 80.0  # wall time of the training, checkpoints not counted
    batch: int = 2048  # tokens per step, padding included
    pool: int = 512  # chats drawn at once and sorted by length, so that little is padded
    muon_lr: float = 0.008
    adam_lr: float = 0.0015
    warm_up: float = 0.05  # share of the time
    decay_from: float = 0.6  # share of the time at which the learning rate starts to fall to nothing
    grow_at: float = 0.85  # share of the time trained with half of the layers
    checkpoint_s: float = 150.0


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (rows, positions)
    weights: Tensor  # loss weight of each token, zero for prompt and padding

    @staticmethod
    def of(rows: list[tuple[list[int], list[float]]]) -> "Batch":
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        return Batch(ids, torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in rows]))


def batches(rng: random.Random, tokenizer: PreTrainedTokenizerFast, plan: Plan, progress: float) -> Iterator[Batch]:
    """One pool of chats, cut into batches of rows of about the same length, in random order."""
    rows = sorted((encode(tokenizer, make_chat(rng, progress)) for _ in range(plan.pool)), key=lambda row: len(row[0]))
    groups: list[list[tuple[list[int], list[float]]]] = [[]]
    for row in rows:
        if len(row[0]) * (len(groups[-1]) + 1) > plan.batch and groups[-1]:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    yield from map(Batch.of, groups)


def answer_logits(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and weights of the tokens that are learnt."""
    learnt = batch.weights[:, 1:] > 0
    logits = model.logits(model.hidden(batch.ids[:, :-1])[learnt])
    return logits, batch.ids[:, 1:][learnt], batch.weights[:, 1:][learnt]


@torch.no_grad()
def exact(model: Decoder, tokenizer: PreTrainedTokenizerFast, items: list[Item]) -> dict[str, float]:
    """Share of items whose every answer token is the likeliest one: what greedy decoding would write, in one pass."""
    right: dict[str, list[bool]] = {}
    for item in items:
        batch = Batch.of([encode(tokenizer, [*item.chat, Turn("assistant", item.answer, 1.0)])])
        logits, targets, _ = answer_logits(model, batch)
        right.setdefault(item.kind, []).append(bool((logits.argmax(-1) == targets).all()))
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}


class Trainer:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, plan: Plan, seed: int, work: Path) -> None:
        torch.manual_seed(seed)
        self.tokenizer, self.plan, self.seed, self.work = tokenizer, plan, seed, work
        self.config = config(tokenizer)
        self.model = Decoder(self.config, self.config.num_hidden_layers // 2)
        plant(self.model)
        self.optimizers = optimizers(self.model, plan.muon_lr, plan.adam_lr)
        self.elapsed, self.tokens, self.steps, self.pools = 0.0, 0, 0, 0
        self.best = 0.0
        self.dev = reading_items(DEV_SEED, 80)

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed / (60 * self.plan.minutes))

    def run(self, publish: Callable[[Decoder], None]) -> None:
        """Trains to the end of the plan; `publish` gets each checkpoint that is the best so far, and the last."""
        saved = self.elapsed
        while self.progress < 1:
            rng = random.Random(f"{self.seed} {self.pools}")
            self.pools += 1
            for batch in batches(rng, self.tokenizer, self.plan, self.progress):
                if self.progress >= self.plan.grow_at and len(self.model.model.layers) < self.config.num_hidden_layers:
                    self._grow()
                self._step(batch)
                if self.elapsed - saved > self.plan.checkpoint_s or self.progress >= 1:
                    saved = self.elapsed
                    if self.save() or self.progress >= 1:
                        publish(copy.deepcopy(self.model))
                if self.progress >= 1:
                    break

    def _grow(self) -> None:
        self.model.grow()
        self.optimizers = optimizers(self.model, self.plan.muon_lr, self.plan.adam_lr)

    def _rate(self) -> float:
        """Share of the full learning rate: up, level, down to nothing."""
        plan = self.plan
        return min(1.0, (self.progress + 1e-3) / plan.warm_up, max(0.02, (1 - self.progress) / (1 - plan.decay_from)))

    def _step(self, batch: Batch) -> None:
        start = time.monotonic()
        for optimizer, rate in zip(self.optimizers, (self.plan.muon_lr, self.plan.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * self._rate()
        logits, targets, weights = answer_logits(self.model, batch)
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.elapsed += time.monotonic() - start
        self.tokens += int(batch.ids.numel())
        self.steps += 1
        if self.steps % 50 == 0:
            print(
                f"{self.elapsed / 60:6.1f} min  step {self.steps:5d}  {self.tokens / 1e6:6.2f} M tokens  "
                f"{self.tokens / self.elapsed:5.0f}/s  loss {loss.item():.3f}",
                flush=True,
            )

    def save(self) -> bool:
        """Writes a checkpoint; whether it is the best so far."""
        marks = exact(self.model, self.tokenizer, self.dev)
        total = sum(marks.values()) / len(marks)
        print(f"dev {total:.2f}  " + "  ".join(f"{kind} {mark:.1f}" for kind, mark in marks.items()), flush=True)
        is_best, self.best = total >= self.best, max(total, self.best)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{key}": tensor for key, tensor in state.items()}
        counts = {name: repr(getattr(self, name)) for name in COUNTS}
        part = self.work / "checkpoint.part"
        save_file(tensors, part, {"layers": str(len(self.model.model.layers)), **counts})
        part.replace(self.work / CHECKPOINT)
        return is_best

    def resume(self) -> None:
        with safe_open(self.work / CHECKPOINT, "pt") as saved:
            notes = saved.metadata()
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 - not a dict
        if int(notes["layers"]) > len(self.model.model.layers):
            self._grow()
        self.model.load_state_dict(_under(tensors, "model"))
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _under(tensors, f"optimizer.{number}").items():
                index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for name, kind in COUNTS.items():
            setattr(self, name, kind(notes[name]))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix + "."): tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")
    }


def train(out: Path, work: Path, minutes: float, seed: int, resume: bool) -> None:
    """Trains from nothing or from the last checkpoint, which `out` holds in the end (until then, the best so far)."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(out) if resume else train_tokenizer(seed)
    trainer = Trainer(tokenizer, Plan(minutes), seed, work)
    if resume:
        trainer.resume()
    trainer.run(lambda decoder: export(decoder, tokenizer, out))
