"""What the model answers to a few training prompts during the training; see SAMPLE_EVERY."""

from pathlib import Path
from types import SimpleNamespace

import masking
from blockwise.cli import InputError
from blockwise.data import Samples
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import checkpoint, hub

PROMPTS = 4  # the first ones of the training samples


class Previews:
    """Answers to the first prompts of the training samples, decoded exactly."""

    def __init__(self, base: Path, config, samples: Samples, knobs: SimpleNamespace):
        """Raises InputError if the prompts cannot be answered: later it would end the training."""
        self.tokenizer = hub.load_tokenizer(base)
        starts = samples.prompt_len[:PROMPTS]
        if samples.width:  # packed texts have no prompts: the first half of each is continued
            starts = starts + samples.ids.shape[1] // 2
        self.what = f"answers to {len(starts)} training prompts"
        self.prompts = [ids[:start].tolist() for ids, start in zip(samples.ids, starts)]
        block_length = getattr(knobs, "BLOCK_SIZE", Settings.block_length)  # the baseline has no blocks
        longest = int((samples.length[:PROMPTS] - starts).max())
        gen_length = masking.num_blocks(longest, block_length) * block_length
        self.settings = Settings(gen_length, block_length, steps=gen_length)
        try:
            decode.make_canvas(config, self.prompts, gen_length, "cpu")
        except InputError as error:
            raise InputError(f"SAMPLE_EVERY={knobs.SAMPLE_EVERY}: {error} Set it to 0.") from error

    def rows(self, model, step: int) -> list[dict]:
        """The lines of samples.jsonl after a step, as dicts. It leaves the model in training mode."""
        model.eval()
        ends = decode.end_ids(model, self.tokenizer)
        answers, _ = decode.decode(checkpoint.without_adapters(model), self.prompts, self.settings, ends)
        model.train()
        rows = []
        for prompt, answer in zip(self.prompts, answers.tolist()):
            completion = decode.completion(self.tokenizer, answer, ends)
            rows.append({"step": step, "prompt": self.tokenizer.decode(prompt), "completion": completion})
        return rows
