"""The head is computed only where there is a loss, and that changes neither the loss nor the gradients."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

import masking
from blockwise.models import base as models


def full_logits_loss(logits, ids, supervised):
    """The loss from logits at every position, the long way: mean over samples of the mean over supervised tokens."""
    some = [b for b in range(len(ids)) if supervised[b].any()]
    return torch.stack([F.cross_entropy(logits[b][supervised[b]], ids[b][supervised[b]]) for b in some]).mean()


@pytest.mark.parametrize("method", ["block-wise", "full sequence"])
def test_same_loss_and_gradients_as_full_logits(base, method):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 400, (5, 40), generator=generator)
    prompt_len, length = torch.tensor([3, 10, 0, 25, 39]), torch.tensor([40, 31, 17, 40, 40])
    draw = {"mask_prob_eps": 1e-3, "generator": generator}
    if method == "block-wise":
        block = torch.tensor([2, 0, 1, 1, 0])
        masked, supervised, _ = masking.blockwise_masks(
            prompt_len, length, block, 40, block_size=8, prefix_mask_rate=0.1, suffix_mask_prob=1.0, **draw
        )
    else:
        masked, supervised, _ = masking.full_sequence_masks(prompt_len, length, 40, **draw)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(models.load_model(base, torch.float32), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # 0 at first, and with it the gradient of A
            torch.nn.init.normal_(weight, std=0.05)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}

    inputs = ids.masked_fill(masked, 4)
    logits = model(input_ids=inputs, logits_to_keep=supervised).logits
    assert logits.shape == (int(supervised.sum()), 400)
    weights = masking.sample_mean_weights(supervised)
    ours = masking.weighted_nll(logits, masking.Noised(inputs, supervised, ids, weights))
    full = full_logits_loss(model(input_ids=inputs).logits, ids, supervised)
    torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-6)
    ours, full = gradients(ours), gradients(full)
    assert any(grad.abs().max() > 1e-4 for grad in full.values())
    for name in full:
        torch.testing.assert_close(ours[name], full[name], rtol=1e-4, atol=1e-7)
