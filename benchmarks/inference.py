"""The engine: many together against one by one, against transfusion-pytorch's `sample_many`, against transformers.

    python benchmarks/inference.py [--quick] [--rounds 5] [--only batching,peer,llama] [--out FILE]
    python benchmarks/inference.py --only int8       # weights in eight bits (extra: quantize) against our own float32

Contenders take turns in one process, and a ratio is taken within a round, as in against_peer.py, whose networks these
are (width 384, depth 8). float32: all but `--dtype bf16`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from against_peer import (
    DTYPES,
    GUIDANCE,
    QUICK,
    Row,
    Scale,
    Work,
    alternate,
    build_peer,
    compare,
    mixed,
    our_config,
    our_engine,
    print_table,
    prompt,
    say,
)

from transfuse.convert.hf_folder import hf_config, hf_weights
from transfuse.devices import keep_freed_memory
from transfuse.diffusion import SamplerConfig
from transfuse.inference import Done, Engine, Request
from transfuse.model import Transfusion

REQUESTS = 16
"""that come together"""


def requests(scale: Scale, engine: Engine, kind: str, count: int) -> list[Request]:
    """Prompts of 16 to 47 tokens; text: as many new ones each; draw: one guided picture each; mixed: every other."""
    found = []
    for number in range(count):
        text = Request(
            prompt(scale, engine, 16 + (number * 7) % 32, number), draw="never", max_tokens=scale.written, seed=number
        )
        drawn = replace(
            text,
            draw="force",
            max_tokens=0,
            size=(scale.side, scale.side),
            sampler=SamplerConfig("dpmpp", steps=scale.midpoints),
            guidance_scale=GUIDANCE,
        )
        found.append(drawn if kind == "draw" or (kind == "mixed" and number % 2) else text)
    return found


def together(engine: Engine, asked: list[Request]) -> Work:
    def work() -> None:
        done = [event for event in engine.run(asked) if isinstance(event, Done)]
        assert len(done) == len(asked)

    return work


def one_by_one(engine: Engine, asked: list[Request]) -> Work:
    def work() -> None:
        for request in asked:
            together(engine, [request])()

    return work


def measure_batching(scale: Scale, dtype: str, rounds: int) -> Iterator[Row]:
    engine = our_engine(scale, DTYPES[dtype], context=1024)
    for kind, target in (("text", 4.0), ("draw", 1.4), ("mixed", 1.4)):
        say(f"batching {kind} {dtype}: {REQUESTS} requests together and one by one")
        asked = requests(scale, engine, kind, REQUESTS)
        found = alternate({"together": together(engine, asked), "alone": one_by_one(engine, asked)}, rounds)
        name = f"{kind} {dtype}, {REQUESTS} together : one by one"
        yield compare(name, "requests/s", REQUESTS, found, ("together", "alone"), target)


def peer_pictures(scale: Scale, dtype: str, count: int) -> Work:
    peer = build_peer(scale).eval()
    ids = [
        torch.randint(0, scale.vocabulary, (scale.text,), generator=torch.Generator().manual_seed(number))
        for number in range(count)
    ]
    shape = (scale.side // 2, scale.side // 2)

    @torch.inference_mode()
    def draw() -> None:
        with mixed(DTYPES[dtype]):
            peer.sample_many(
                ids,
                max_length=1,
                force_modality_at_start=(0, shape),
                fixed_modality_shape=shape,
                modality_steps=scale.midpoints + 1,
                cfg_scale=GUIDANCE,
            )

    return draw


def measure_peer(scale: Scale, dtype: str, rounds: int) -> Iterator[Row]:
    """Eight guided pictures: as many evaluations of the network for each, two a step of the peer's midpoint rule."""
    count, evaluations = 8, 2 * scale.midpoints
    say(f"peer {dtype}: {count} guided pictures of {scale.patches} patches, {evaluations} evaluations each")
    engine = our_engine(scale, DTYPES[dtype], context=1024)
    sampler = SamplerConfig("dpmpp", evaluations)
    asked = [
        replace(request, document=prompt(scale, engine, scale.text, number), sampler=sampler)
        for number, request in enumerate(requests(scale, engine, "draw", count))
    ]
    found = alternate({"ours": together(engine, asked), "peer": peer_pictures(scale, dtype, count)}, rounds)
    name = f"{count} pictures {dtype} : sample_many"
    row = compare(name, "images/s", count, found, ("ours", "peer"), 5.0)
    yield replace(row, note=f"per sampler step twice that: {2 * (row.ratio or 0):.1f}x")


def llama_text(scale: Scale, dtype: str, rows: int) -> Work:
    """transformers' `generate` of the same trunk, its default cache, SDPA: greedy, as many tokens."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = our_config(scale, max_seq_len=1024, images="none")
    ours = Transfusion(config).initialise(0)
    theirs: Any = LlamaForCausalLM(LlamaConfig(**{**hf_config(config), "attn_implementation": "sdpa"}))
    theirs.load_state_dict(hf_weights(ours), strict=True)
    theirs = theirs.to(DTYPES[dtype]).eval()
    ids = torch.randint(8, scale.vocabulary, (rows, scale.text), generator=torch.Generator().manual_seed(3))
    settings = GenerationConfig(
        max_new_tokens=scale.written, min_new_tokens=scale.written, do_sample=False, use_cache=True, pad_token_id=0
    )

    @torch.inference_mode()
    def write() -> None:
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert out.shape == (rows, scale.text + scale.written)

    return write


def measure_llama(scale: Scale, dtype: str, rounds: int) -> Iterator[Row]:
    engine = our_engine(scale, DTYPES[dtype], context=1024)
    for rows in (1, 8):
        say(f"llama {dtype}: {rows} x {scale.written} tokens after {scale.text}, greedy, cached")
        asked = [
            Request(prompt(scale, engine, scale.text, row), draw="never", max_tokens=scale.written)
            for row in range(rows)
        ]
        found = alternate({"ours": together(engine, asked), "theirs": llama_text(scale, dtype, rows)}, rounds)
        name = f"text {dtype}, batch {rows} : transformers"
        yield compare(name, "tokens/s", rows * scale.written, found, ("ours", "theirs"), 1.0)


def measure_int8(scale: Scale, dtype: str, rounds: int) -> Iterator[Row]:
    engines = {
        "int8": our_engine(scale, DTYPES[dtype], context=1024, kind="int8"),
        "plain": our_engine(scale, DTYPES[dtype], context=1024),
    }
    for kind, count in (("text", 1), ("text", 8), ("draw", 1)):
        say(f"int8 {dtype}: {kind}, {count} at a time, weights in eight bits and as they are")
        works = {name: together(engine, requests(scale, engine, kind, count)) for name, engine in engines.items()}
        name = f"{kind} {dtype}, batch {count}, int8 : as it is"
        yield compare(name, "requests/s", count, alternate(works, rounds), ("int8", "plain"))


MEASURES: dict[str, Callable[[Scale, str, int], Iterator[Row]]] = {
    "batching": measure_batching,
    "peer": measure_peer,
    "llama": measure_llama,
    "int8": measure_int8,
}
DEFAULT = ("batching", "peer", "llama")
"""what needs no extra but the peers"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks: does it run?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--only", default=",".join(DEFAULT))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    keep_freed_memory()
    scale = QUICK if asked.quick else Scale()
    rows = [row for name in asked.only.split(",") for row in MEASURES[name](scale, asked.dtype, asked.rounds)]
    print_table(rows, judge=not asked.quick)
    if asked.out:
        found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
