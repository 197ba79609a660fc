"""What the gateway adds: beside other gateways, and with many streams at once; and that nothing unjudged gets out.

    python benchmarks/gateway.py                                     # many streams through our own gateway
    python benchmarks/gateway.py --peers FOLDER                      # and all parts beside LiteLLM's proxy and Portkey
    python benchmarks/gateway.py --peers FOLDER --parts latency saturation
    python benchmarks/gateway.py --parts streams --streams 400 --pace 2 --guard edge:FOLDER --out FILE.json

In one run the same upstream is reached directly, through a gateway with `NoGuard` (the same code with a guard that
finds everything safe at once), through a gateway with the guard under test, and through the peers, plain and with their
own guards. Both gateways of ours have the balanced policy and keep every decision in SQLite. The environments of the
peers are made in FOLDER when they are not there: that takes pip, npm and a network, once.

The parts: `gateway_peers` says what *latency*, *saturation*, *memory* and *length* are, `gateway_streams` what
*streams* is. Everything runs on loopback and stores what arrives and when; it is read after the exchanges ended. What
each client received is compared with what is due, character by character.

Writes tables to the terminal, ``benchmarks/results/gateway-DATE.json``, and plots beside it. Parts that a file of that
name has already stay in it when they are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop

from gateway_peers import PARTS, goals, measured_peers, plot_peers
from gateway_servers import LITELLM, PORTKEY, serve
from gateway_streams import PACES, Setting, measured_streams, plot_streams
from gateway_upstream import WORDS

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What it ran on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ("tidegate", "onnxruntime", "uvicorn", "uvloop", "httptools", "aiohttp", "starlette", "tokenizers")
    return {
        "cpu": model,
        "cores": cores,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def run_streams(setting: Setting, hardware: dict[str, Any], out: Path) -> dict[str, Any]:
    results = uvloop.run(measured_streams(setting))
    delays = results.pop("_delays")
    title = f"{setting.streams} streams at {setting.pace:g} words/s, {hardware['cores']} cores for everything"
    plot_streams(delays, title, out.with_name(f"{out.stem}-streams.png"))
    print("\nadded by the guard (ms)")
    for row in results["added_ms"]:
        for pair in ("guard - no guard", "guard - direct"):
            cells = (
                f"{name} P50 {found['p50']:+.1f} P99 {found['p99']:+.1f}" for name, found in row[pair].items() if found
            )
            print(f"  {row['streams']:4d} streams, {pair:16s} " + " | ".join(cells))
    return {"words": WORDS, **results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("streams", *PARTS), help="default: streams; all with --peers")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where the peers' environments are, or are made")
    parser.add_argument("--streams", type=int, default=200, help="the most streams at once (default 200)")
    parser.add_argument("--pace", type=float, default=5.0, help="words per second of each stream (default 5)")
    parser.add_argument("--paces", type=float, nargs="*", default=PACES, help="paces to look for the one too much")
    parser.add_argument("--rounds", type=int, default=3, help="rounds with the most streams (default 3)")
    parser.add_argument("--texts", type=int, default=48, help="how many different answers (default 48)")
    parser.add_argument("--guard", default="edge", help="edge, or edge:FOLDER")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/gateway-DATE.json")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        serve(arguments.role)
        return
    parts = arguments.parts or (("streams", *PARTS) if arguments.peers else ("streams",))
    now = datetime.datetime.now(datetime.UTC)
    out = arguments.out or RESULTS / f"gateway-{now:%Y-%m-%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    hardware = machine()
    found: dict[str, Any] = {}
    if "streams" in parts:
        setting = Setting(
            arguments.streams, arguments.pace, arguments.paces, arguments.rounds, arguments.texts, arguments.guard
        )
        found["streams"] = run_streams(setting, hardware, out)
    if others := [part for part in PARTS if part in parts]:
        found |= uvloop.run(measured_peers(others, arguments.guard, arguments.peers))
    for part in found.values():
        part["date"] = now.isoformat(timespec="seconds")
    report = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    peers = {"litellm": LITELLM, "portkey": PORTKEY}
    report |= {"date": now.isoformat(timespec="seconds"), "machine": hardware, "peers": peers, **found}
    out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if set(PARTS) & set(report):
        plot_peers(report, f"one core for the gateway ({hardware['cpu']})", out.with_name(f"{out.stem}-peers.png"))
    if "latency" in found:
        print("\n" + "\n".join(goals(found["latency"])))
    print(f"written: {out}, and plots beside it")
    if wrong := [error for part in found.values() for error in part["errors"]]:
        raise SystemExit(f"{len(wrong)} errors")


if __name__ == "__main__":
    main()
