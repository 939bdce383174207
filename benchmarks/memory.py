"""GPU memory of a LLaDA-8B training step, calculated: no GPU and no checkpoint is needed.

    python -m benchmarks.memory

Weights, adapters, gradients and optimizer state follow from the sizes; what a decoder layer saves for its backward pass
is counted on the CPU, with one layer of LLaDA-8B's width. Not in it: the allocator's slack, and DeepSpeed's buffers.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import train_blockwise as defaults
from benchmarks.common import LLADA_8B, parameters
from blockwise.models import llada

GB = 1e9


class OneLayer(torch.nn.Module):
    """One decoder layer of LLaDA-8B and what it needs."""

    def __init__(self, config):
        super().__init__()
        self.layer, self.rope = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x):
        positions = torch.arange(x.shape[1])[None]
        return self.layer(x, position_embeddings=self.rope(x, positions), attention_mask=None)


def saved_bytes_per_token(config, dropout, rank=defaults.LORA_RANK, tokens=16):
    """Bytes that one adapted layer keeps for its backward pass, per token, in bf16; each storage counted once."""
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    lora = LoraConfig(r=rank, lora_dropout=dropout, target_modules=defaults.TARGET_MODS)
    model = get_peft_model(OneLayer(config), lora, autocast_adapter_dtype=False)
    torch.set_default_dtype(torch.float32)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = model(torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True))
    total = sum(storage.nbytes() for storage in saved.values())
    del out
    return total / tokens


def total_bytes(config, base, lora, rows, saved, checkpointing, gpus=1):
    """Bytes on each of some GPUs in a block-wise training step with GRAD_ACC 1 and the default MAX_LEN.

    base, lora: numbers of parameters; saved: see saved_bytes_per_token.
    """
    tokens, layers = rows * defaults.MAX_LEN, config.num_hidden_layers
    kept = 2 * config.hidden_size * layers + saved if checkpointing else saved * layers  # a layer's inputs, one layer
    head = 3 * 4 * rows * defaults.BLOCK_SIZE * config.vocab_size  # fp32 logits, their softmax and gradient
    return base * 2 + lora * 4 + lora * 12 / gpus + tokens * kept + head


def main():
    config = llada.LLaDAConfig.from_dict(LLADA_8B)
    base, lora = parameters(config, defaults.LORA_RANK)
    print(f"base {base:,} parameters x 2 bytes = {base * 2 / GB:.1f} GB")
    print(f"adapters {lora:,} x 2 bytes = {lora * 2 / GB:.2f} GB, their gradients as much")
    print(f"optimizer {lora:,} x 12 bytes (fp32 copy, two moments) = {lora * 12 / GB:.1f} GB / GPUs")
    print(f"full fine-tuning: the base, and {base:,} x (2 + 12) bytes of gradients and optimizer", end=" ")
    print(f"= {base * 14 / GB:.0f} GB / GPUs; 12 of the 14 bytes are in a resume point: {base * 12 / GB:.0f} GB")
    per_token = {dropout: saved_bytes_per_token(config, dropout) for dropout in (0.0, defaults.LORA_DROPOUT)}
    for dropout, size in per_token.items():
        print(f"a layer saves {size / 1e3:.0f} kB per token with LORA_DROPOUT={dropout}")
    print(f"\nGB per GPU at MAX_LEN {defaults.MAX_LEN}, LORA_RANK {defaults.LORA_RANK}, block-wise:")
    print(f"{'MICRO_BSIZE':>11} {'LORA_DROPOUT':>12} {'checkpointing':>13} {'1 GPU':>7} {'8 GPUs':>7}")
    for rows in (32, 16, 8):
        for dropout, size in per_token.items():
            for checkpointing in (False, True):
                total = [total_bytes(config, base, lora, rows, size, checkpointing, gpus) for gpus in (1, 8)]
                print(f"{rows:>11} {dropout:>12} {checkpointing!s:>13} " + " ".join(f"{t / GB:>7.0f}" for t in total))


if __name__ == "__main__":
    main()
