"""How a step, its memory and a rank change grow with the rank, the number of sites and the tokens of a step.

`benchmarks/suite.py` runs it as the parts scaling-rank, scaling-sites and scaling-tokens. The step is that of LoRA on
MiniLM's shape, next to the limit at the same point and to SimplexLoRA in its search.
"""

import gc
import statistics
from functools import partial
from typing import Any

import arms
import transformers
from measures import in_turns, kept, over
from parts import rank_change, result

RANK, TOKENS, NARROW = 8, 512, 64
POINTS = {"rank": (1, 4, 16, 64, 256), "sites": (13, 49, 193, 997), "tokens": (256, 1024, 4096, 16384)}


def scaling(tokens: int, rounds: int, axis: str) -> dict[str, Any]:
    """A row for each point of an axis, up to 32 times `tokens` and with a fifth of the rounds, three at least."""
    rounds = max(3, rounds // 5)
    rows = []
    for value in POINTS[axis]:
        if axis == "tokens" and value > 32 * tokens:
            continue
        at = {"rank": RANK, "tokens": min(tokens, TOKENS), axis: value}
        config = with_sites(value) if axis == "sites" else arms.SHAPES["bert"]
        rows.append({axis: value, **point(config, at["rank"], at["tokens"], rounds)})
        gc.collect()
    return result(rows, rounds=rounds)


def with_sites(count: int) -> transformers.BertConfig:
    """A narrow BERT with so many linear layers, six in a block, and its pooler."""
    config = arms.SHAPES["bert"].to_dict()
    more = {"hidden_size": NARROW, "intermediate_size": 4 * NARROW, "num_attention_heads": 2}
    return transformers.BertConfig.from_dict(config | more | {"num_hidden_layers": (count - 1) // 6})


def point(config: Any, rank: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Times over each other, seconds, and bytes kept for the backward pass."""
    batch = arms.rows(tokens)
    limit = arms.Limit(config, rank, batch)
    lora, search = arms.ours(config, rank, "lora"), arms.ours(config, rank, "simplex-lora")
    sizes = [kept(arm.model, partial(arm.loss, batch)) for arm in (limit, lora)]
    changed = arms.ours(config, rank, "lora")
    changed.step(batch)  # B is no longer 0
    less = max(1, rank // 2)
    runs = limit.turns() | {"lora": partial(lora.step, batch), "search": partial(search.step, batch)}
    seconds = in_turns(runs | {"change": rank_change(changed.model, less, rank + less)}, rounds)
    least = limit.least(seconds)
    return {
        "over limit": over(seconds["lora"], least),
        "search over lora": over(seconds["search"], seconds["lora"]),
        "change over step": over(seconds["change"], seconds["lora"]),
        "seconds": {name: statistics.median(seconds[name]) for name in ("lora", "change")},
        "kept by limit": sizes[0],
        "kept": sizes[1],
    }
