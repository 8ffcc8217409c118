"""Peak memory of log-probs and entropy, forward and backward, in chunks and all at once.

    python benchmarks/logprob_memory.py --vocabulary 131072 --tokens 256 512 1024 --chunks 32 128

prints a table. Every figure comes from a fresh process: on a CPU the growth of its resident memory over what it held
before (Linux), on a GPU the growth of allocated memory.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from measuring import forget_peak, peak, resident

from remax.core.logprobs import token_stats

MEGABYTE = 2**20


def problem(tokens: int, vocabulary: int, width: int):
    """(N, H) hidden states, (V, H) weight, both with gradient buffers, and (N,) targets."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device).mul_(0.05).requires_grad_()
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    return hidden, weight, torch.randint(vocabulary, (tokens,), device=device)


def in_chunks(hidden, weight, targets, chunk: int) -> None:
    logprobs, entropy, _ = token_stats(
        hidden, lambda h: h @ weight.T, targets, chunks=max(1, -(-len(targets) // chunk)), entropy=True
    )
    (logprobs.sum() + entropy.sum()).backward()


def at_once(hidden, weight, targets, chunk: int) -> None:
    """As one would write it down."""
    logits = hidden @ weight.T  # (N, V)
    logp = logits.log_softmax(-1)
    logprobs = logp.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1).detach()
    (logprobs.sum() + entropy.sum()).backward()


def measure(way: str, tokens: int, chunk: int, vocabulary: int, width: int) -> tuple[float, float]:
    """(peak MB beyond inputs, weights and gradients; seconds) of one forward and backward."""
    torch.set_num_threads(1)
    run = {"chunks": in_chunks, "at once": at_once}[way]
    run(*problem(4, 64, width), chunk)  # what a first call loads is not counted
    inputs = problem(tokens, vocabulary, width)
    gc.collect()
    cuda = torch.cuda.is_available()
    forget_peak()
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    begin = time.perf_counter()
    run(*inputs, chunk)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return (peak() - before) / MEGABYTE, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--vocabulary", type=int, default=131072, help="words (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="width of the hidden states (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[256, 512, 1024], help="batch times length (default: %(default)s)"
    )
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[32, 128], help="tokens per chunk (default: %(default)s)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available() and sys.platform != "linux":
        sys.exit("without a GPU this measures resident memory, which it can read on Linux only")
    cases = [("chunks", chunk) for chunk in args.chunks] + [("at once", 0)]
    print(f"vocabulary {args.vocabulary}, one (tokens, vocabulary) tensor in float32:")
    print("| tokens | one such tensor | tokens at a time | peak | seconds |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    # glibc keeps what it allocated below this limit, and raises the limit by itself: the chunks would pile up there.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for tokens in args.tokens:
        whole = tokens * args.vocabulary * 4 / MEGABYTE
        for way, chunk in cases:
            # A process for each figure, since a peak cannot be taken back.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                held, seconds = pool.submit(measure, way, tokens, chunk, args.vocabulary, args.hidden).result()
            size = chunk or "all"
            print(f"| {tokens} | {whole:.0f} MB | {size} | {held:.0f} MB | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
