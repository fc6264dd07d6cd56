"""``status`` for people: the /mesh/status document as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table


def print_status(document: dict[str, Any], *, clear: bool = False) -> None:
    console = Console()
    if clear:
        console.clear()
    names = {member["id"]: escape(member["name"]) for member in document["members"]}
    coordinator = names.get(document["coordinator"], "none")
    voters = ", ".join(names.get(voter, voter[:8]) for voter in document["voters"])
    mesh = document["mesh_id"][:8]
    console.print(f"mesh {mesh}  coordinator {coordinator}  term {document['term']}  voters {voters}")
    if document["degraded"]:
        console.print(f"[yellow]degraded: {escape(document['degraded'])}")
    elif document.get("failover"):
        console.print(f"[yellow]no failover: {escape(document['failover'])}")
    console.print(_members(document))
    console.print(_models(document, names))
    items = document["sessions"]["items"]
    console.print(_load(document["sessions"]))
    if items:
        console.print(_sessions(items, names))


def _load(sessions: dict[str, Any]) -> str:
    """How many run, are paused and wait, and where places were taken back."""
    told = f"sessions: {sessions['running']} running, {sessions['paused']} paused, {sessions['waiting']} waiting"
    classes = sessions["classes"]
    waiting = ", ".join(f"{each['waiting']} {name}" for name, each in classes.items() if each["waiting"])
    most = max(each["limit"] for each in classes.values())
    cut = ", ".join(f"{name} from {each['limit']} on" for name, each in classes.items() if each["limit"] < most)
    return told + (f" ({waiting})" if waiting else "") + (f"; the mesh is short of room: waiting {cut}" if cut else "")


def _members(document: dict[str, Any]) -> Table:
    whole = Column("API", no_wrap=True)  # an address that is cut short is of no use
    table = Table("NODE", "STATE", "ROLE", whole, "LAYERS", "LOAD", box=None, pad_edge=False)
    for member in document["members"]:
        spans = escape(" ".join(f"{s['model']}[{s['start']}:{s['end']}]" for s in member["spans"]))
        for span in member["loading"]:
            spans += f" [yellow]loading \\[{span['start']}:{span['end']}], {member['fetched']} % fetched[/]"
        for why in member["refused"]:
            spans += f" [red]{escape(why)}[/]"
        load = member["load"]
        busy = f"{load['running']} running, {load['tokens_per_s']:.0f} tokens/s"
        if member["state"] in ("dead", "left"):
            spans, busy = "", "-"
        colour = {"alive": "green", "suspect": "yellow", "dead": "red"}.get(member["state"], "dim")
        state = f"[{colour}]{member['state']}[/]"
        said = (escape(member["name"]), state, escape(member["role"]), escape(member["api"]))
        table.add_row(*said, spans or "-", busy)
    return table


def _models(document: dict[str, Any], names: dict[str, str]) -> Table:
    table = Table("MODEL", "PLACED ON", "SURVIVES", box=None, pad_edge=False)
    for model in document["placement"]["models"]:
        spans = " ".join(f"{names.get(s['node'], s['node'][:8])}[{s['start']}:{s['end']}]" for s in model["spans"])
        survives = document["survivability"].get(model["id"], {}).get("nodes_that_may_fail", 0)
        survived = "-" if model["missing"] else f"any {survives} nodes failing"
        table.add_row(escape(model["id"]), escape(model["missing"] or "") or spans, survived)
    return table


def _sessions(items: list[dict[str, Any]], names: dict[str, str]) -> Table:
    table = Table("SESSION", "MODEL", "CLASS", "STATE", "ROUTE", "TOKENS", "RECOVERIES", box=None, pad_edge=False)
    for item in items:
        hops = " ".join(f"{names.get(h['node'], h['node'][:8])}[{h['start']}:{h['end']}]" for h in item["route"])
        what = (escape(item["id"]), escape(item["model"]), item["class"], item["state"])
        table.add_row(*what, hops, str(item["tokens"]), str(len(item["recoveries"])))
    return table
