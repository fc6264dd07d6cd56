"""What `--evaluate` prints: the examination's tables, sample texts and the figures."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from demo_model.chats import Turn
from demo_model.evaluate import Mark, Model, examine, failures, share, table
from demo_model.exam import EXAM_SEED, citation_items, reading_items, style_items

READING_GOAL, STYLE_GOAL, SIZE_GOAL_MB = 0.80, 0.80, 20.0
SAMPLES = (
    ("", "Who are you?"),
    ("", "Tell me a short story about a fox and a bell."),
    ("You are a pirate; begin with Arr", "What colour is the sky?"),
    ("Answer in capital letters.", "Hello!"),
    ("End every answer with 'over and out'.", "The baker is Zorvek. Mira lives in Tolbekholm. Who is the baker?"),
    ("", "Count from 1 to 20."),
)


def _figure(what: str, value: float, unit: str, goal: str, holds: bool, anchor: str) -> dict[str, object]:
    return {"what": what, "value": round(value, 3), "unit": unit, "goal": goal, "holds": holds, "anchor": anchor}


def _figures(reading: list[Mark], styles: list[Mark], folder: Path) -> dict[str, dict[str, object]]:
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    exact, obeyed = share(reading), share(styles)
    return {
        "D1": _figure(
            "exact answers from an unseen context",
            exact,
            "share",
            ">= 0.80",
            exact >= READING_GOAL,
            "0.0 before training",
        ),
        "D2": _figure(
            "system line obeyed, exact answers", obeyed, "share", ">= 0.80", obeyed >= STYLE_GOAL, "0.0 before training"
        ),
        "D3": _figure("size of the folder", megabytes, "MB", "<= 20", megabytes <= SIZE_GOAL_MB, "-"),
    }


def _samples(model: Model) -> str:
    chats = [[Turn("system", system)] * bool(system) + [Turn("user", user)] for system, user in SAMPLES]
    said = model.answer(chats, 200)
    return "\n".join(f"[{system}] {user}\n  -> {text}" for (system, user), text in zip(SAMPLES, said, strict=True))


def run(folder: Path, root: Path, as_json: bool) -> int:
    """Examines the model, prints what it found, and returns the exit status: 0 when every figure holds, else 3."""
    model = Model.load(folder)
    reading_marks = examine(model, reading_items(EXAM_SEED))
    citation_marks = examine(model, citation_items(EXAM_SEED))
    style_marks = examine(model, style_items(EXAM_SEED))
    print(table("reading: exact answers from unseen passages", reading_marks))
    print(failures(reading_marks, 5))
    print(table("\nretrieval prompts: exact answers with the right passage number", citation_marks))
    unnumbered = sum(mark.answer_exact for mark in citation_marks)
    print(f"right when the number is left aside: {unnumbered} / {len(citation_marks)}")
    print(table("\nsystem lines: exact answers in the style asked for", style_marks))
    print(failures(style_marks, 5))
    print(f"\nsamples\n{_samples(model)}\n")
    figures = _figures(reading_marks, style_marks, folder)
    for name, figure in figures.items():
        print(f"{name} {figure['what']}: {figure['value']} {figure['unit']} (goal {figure['goal']})", end="")
        print(" holds" if figure["holds"] else " MISSED")
    if as_json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
        date = datetime.now(UTC).isoformat(timespec="seconds")
        print(
            json.dumps(
                {"figures": figures, "commit": commit, "machine": platform.platform(), "date": date, "seed": EXAM_SEED}
            )
        )
    return 0 if all(figure["holds"] for figure in figures.values()) else 3
