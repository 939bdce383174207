"""LLaDA-8B on 1 to 64 GPUs, calculated: what ZeRO-2 and plain data parallel hold and send, and how long a step takes.

    python -m benchmarks.scale

Every GPU trains MICRO_BSIZE rows of MAX_LEN tokens per step, without LoRA dropout, with GRAD_ACC 1. Per step and GPU,
both ways send the gradients of the adapters once and receive them once: ZeRO-2 as a reduce-scatter before the optimizer
and an all-gather of the weights after it (with GRAD_ACC n, n reduce-scatters), plain data parallel as an all-reduce.
They differ in the optimizer's memory. The rates are assumptions, in the flags: FLOP/s of one GPU in training, and
bandwidth per GPU within a machine of 8 and between machines. Sending is taken to overlap with nothing.
"""

import argparse

import train_blockwise as defaults
from benchmarks import common
from blockwise.models import llada

GPUS = (1, 2, 4, 8, 16, 32, 64)
GB = 1e9


def step(gpus, flops, adapter_bytes, args):
    """Bytes that a GPU sends per step, and the seconds of computing and of sending."""
    sent = 2 * adapter_bytes * (gpus - 1) / gpus
    bandwidth = args.nvlink if gpus <= 8 else args.network
    return sent, flops / (args.tflops * 1e12), sent / (bandwidth * GB)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tflops", type=float, default=421, help="of one GPU in training. 421 is 53 %% of the 794 of an H100's bf16 "
        "matrix products: NeMo AutoModel publishes 402 and 423 for bf16 LoRA on an 8B and a 7B model. The best that is "
        "published, NVIDIA's recipe for Llama 3 8B with fewer adapters, reaches 533",
    )  # fmt: skip
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s per GPU and direction within a machine")
    parser.add_argument("--network", type=float, default=50, help="GB/s per GPU between machines (400 Gbit/s each)")
    args = parser.parse_args()
    config = llada.LLaDAConfig.from_dict(common.LLADA_8B)
    _, lora = common.parameters(config, defaults.LORA_RANK)
    tokens = defaults.MICRO_BSIZE * defaults.MAX_LEN
    heads = defaults.MICRO_BSIZE * defaults.BLOCK_SIZE // 2  # on average, half of a block is supervised
    flops = common.step_flops(config, defaults.LORA_RANK, tokens, defaults.MAX_LEN, heads)
    print(
        f"{flops / tokens / 1e9:.1f} GFLOP per token; adapters and their gradients {2 * lora / GB:.2f} GB each in bf16"
    )
    print("GPUs  rows/step  optimizer GB: ZeRO-2   plain   GB sent   ms sent   s/step   tokens/s  of linear")
    for gpus in GPUS:
        sent, computing, sending = step(gpus, flops, 2 * lora, args)
        seconds = computing + sending
        print(
            f"{gpus:>4} {gpus * defaults.MICRO_BSIZE:>10,} {12 * lora / GB / gpus:>21.2f} {12 * lora / GB:>7.2f} "
            f"{sent / GB:>9.2f} {sending * 1e3:>9.1f} {seconds:>8.2f} {gpus * tokens / seconds:>10,.0f} "
            f"{computing / seconds:>9.0%}"
        )


if __name__ == "__main__":
    main()
