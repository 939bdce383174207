"""Both trainers at a tiny size, on 1 and 2 CPU ranks; under the real deepspeed launcher once each."""

import csv
import json
import math
import re
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, arguments, launch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import masking
import train_blockwise
from blockwise import cli, engine, trainer
from blockwise.cli import InputError
from blockwise.data import Samples, derive_seed, make_samples, schedule
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import base as models
from blockwise.models import llada
from blockwise.models.hub import weight_files
from blockwise.previews import Previews
from blockwise.run.ranks import Ranks
from blockwise.run.run_folder import new_run

KNOBS = {
    "MASK_ID": 4, "MAX_LEN": 192, "LORA_RANK": 4, "LR": 1e-2, "BF16": False, "MICRO_BSIZE": 2,
    "GRAD_ACC": 2, "BLOCK_SIZE": 16, "LORA_DROPOUT": 0.0, "CKPT_DIR": "out/run", "EOS_TAIL": False,
}  # fmt: skip
DEFAULTS = {name: getattr(train_blockwise, name) for name in ("TOTAL_TRAIN_STEPS", "SAVE_EVERY", "RESUME_EVERY")}


def flags(script, base, pt_file, **changes):
    return arguments(script, KNOBS | {"MODEL_NAME": base, "DATA_PT": pt_file} | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, forked):
    """trained(script, ranks, **knobs) -> the folder of that run; each is made once, with ranks that are forked."""
    runs = {}

    def train(script="train_blockwise.py", ranks=1, again=0, **changes):
        key = (script, ranks, again, *sorted(changes.items()))
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("run") if not again else train(script, ranks, again - 1, **changes)
            done = forked(runs[key], ranks, script, **DEFAULTS | KNOBS | changes)
            assert not any(done.codes), done.output
        return runs[key]

    return train


def read(pt_file):
    return torch.load(pt_file, weights_only=True)


def read_csv(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def losses(folder, logs="out/run_logs"):
    return [float(row["loss"]) for row in read_csv(folder / logs / "train_loss.csv")]


def tensors(folder):
    return {name: weight for file in weight_files(folder) for name, weight in load_file(file).items()}


def literal_training(base, pt_file, steps, size, rank=4):
    """Block-wise training in a plain loop: full logits, one forward pass per sample, torch's AdamW, no engine.

    rank: of the adapters, 0 = all weights. Returns the numbers of each step, and the model.
    """
    knobs = SimpleNamespace(**{k: v for k, v in vars(train_blockwise).items() if k.isupper()} | KNOBS)
    data = read(pt_file)
    lengths = torch.tensor([(sample["prompt_len"], len(sample["full_ids"])) for sample in data])
    blocks = torch.tensor([math.ceil((end - start) / knobs.BLOCK_SIZE) for start, end in lengths.tolist()])
    order = schedule(blocks, 1, knobs.SEED)
    model = models.load_model(base, torch.float32)
    set_seed(knobs.SEED)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=knobs.TARGET_MODS))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    log = []
    for step in range(1, steps + 1):
        sample, block = order[(step - 1) * size : step * size].T
        generator = torch.Generator().manual_seed(derive_seed(knobs.SEED, "masks", step))
        masked, supervised, _ = masking.blockwise_masks(
            *lengths[sample].T, block, knobs.MAX_LEN, block_size=knobs.BLOCK_SIZE, mask_prob_eps=1e-3,
            prefix_mask_rate=0.0, suffix_mask_prob=1.0, generator=generator,
        )  # fmt: skip
        parts = []
        for i, ask, mask in zip(sample.tolist(), supervised, masked):
            ids = F.pad(data[i]["full_ids"], (0, knobs.MAX_LEN - len(data[i]["full_ids"])), value=1)
            if ask.any():
                logits = model(torch.where(mask, 4, ids)[None]).logits[0]
                parts.append(F.cross_entropy(logits[ask], ids[ask]))
        loss = torch.stack(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        warmup = 1  # 10 % of 6 steps, rounded up
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        optimizer.param_groups[0]["lr"] = knobs.LR * (1.0 if step <= warmup else cosine)
        optimizer.step()
        log.append((loss.item(), norm.item(), optimizer.param_groups[0]["lr"], int(supervised.sum())))
    return log, model


@pytest.mark.parametrize("ranks, accumulation, lora_rank", [(1, 4, 4), (2, 2, 4), (1, 4, 0), (2, 2, 0)])
def test_the_engine_does_what_a_plain_loop_does(trained, base, pt_file, ranks, accumulation, lora_rank):
    """Same losses, gradient norms, learning rates and token counts, for any split of the global batch."""
    folder = trained(ranks=ranks, GRAD_ACC=accumulation, LORA_RANK=lora_rank)
    rows = read_csv(folder / "out/run_logs/metrics.csv")
    literal, _ = literal_training(base, pt_file, steps=53 // 8, size=8, rank=lora_rank)
    assert len(rows) == len(literal) == 6
    for row, (loss, norm, lr, supervised) in zip(rows, literal):
        assert float(row["loss"]) == pytest.approx(loss, abs=2e-4)
        assert float(row["grad_norm"]) == pytest.approx(norm, rel=2e-3)
        assert float(row["lr"]) == pytest.approx(lr, rel=1e-5)
        assert int(row["supervised_tokens"]) == supervised
        assert float(row["tokens_per_second"]) > 0 and float(row["peak_memory_gb"]) > 0
    assert losses(folder)[0] > losses(folder)[-1] + 0.3  # and it learns


@pytest.mark.parametrize("script, ranks", [("train_blockwise.py", 2), ("train_fullseq.py", 1)])
def test_a_run_ends_with_a_checkpoint_that_differs_in_the_adapted_tensors_only(tmp_path, base, pt_file, script, ranks):
    """Under the real launcher."""
    folder, size = tmp_path, 4 * ranks
    done = launch(ranks, script, *flags(script, base, pt_file), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"global batch {size} = 2 MICRO_BSIZE x 2 GRAD_ACC x {ranks} ranks" in done.stdout
    steps = 53 // size  # 53 samples: no batch size divides them
    assert len(losses(folder)) == steps and all(math.isfinite(loss) for loss in losses(folder))
    checkpoint = folder / f"out/run_step{steps:04d}"
    assert {file.name for file in (folder / "out").iterdir()} == {checkpoint.name, "run_logs"}
    before, after = tensors(base), tensors(checkpoint)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linears = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    assert changed == {f"model.transformer.blocks.{i}.{name}.weight" for i in range(2) for name in linears}
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16} and before.keys() == after.keys()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"),
        AutoTokenizer.from_pretrained(base),
    )
    assert model(**tokenizer("Ada has 3 pens.", return_tensors="pt")).logits.isfinite().all()
    assert "merged against unmerged logits: mean difference" in done.stdout


def test_logs_hold_all_constants_and_the_engine_configuration(trained):
    folder = trained(ranks=2, GRAD_ACC=2)
    logged = json.loads((folder / "out/run_logs/ablation_config.json").read_text())
    for name, default in vars(train_blockwise).items():
        if name.isupper() and name not in ("MODEL_NAME", "DATA_PT"):
            assert logged[name] == KNOBS.get(name, default)
    assert logged["derived"]["total_steps"] == 6 and logged["derived"]["ranks"] == 2
    assert logged["LORA_ALPHA"] == 0 and logged["derived"]["lora_alpha"] == 8
    text = (folder / "out/run_logs/ds_zero2.json").read_text()
    assert text == (folder / "ds_zero2.json").read_text()
    config = json.loads(text)
    assert config["zero_optimization"]["stage"] == 2 and config["optimizer"]["params"]["lr"] == 1e-2
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 2)
    assert read_csv(folder / "out/run_logs/train_loss.csv")[0].keys() == {"step", "loss"}


def test_a_working_directory_that_cannot_be_written_ends_no_run(forked, tmp_path):
    (tmp_path / "run/ds_zero2.json").mkdir(parents=True)  # root may write everywhere, but not a file of this name here
    done = forked(tmp_path / "run", **DEFAULTS | KNOBS | {"TOTAL_TRAIN_STEPS": 1})
    assert done.codes == [0] and (tmp_path / "run/out/run_logs/ds_zero2.json").stat().st_size, done.output
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"out", "ds_zero2.json"}


def test_the_same_command_twice_gives_the_same_csv_in_new_folders(trained):
    """With dropout, and on 2 ranks; nothing of the first run is overwritten."""
    knobs = {"ranks": 2, "LORA_DROPOUT": 0.1, "TOTAL_TRAIN_STEPS": 4}
    folder = trained(**knobs)
    first = (folder / "out/run_logs/train_loss.csv").read_bytes()
    trained(again=1, **knobs)
    assert {file.name for file in (folder / "out").iterdir()} == {
        "run_logs", "run_logs-v2", "run_step0004", "run_step0004-v2"
    }  # fmt: skip
    assert (folder / "out/run_logs/train_loss.csv").read_bytes() == first
    assert (folder / "out/run_logs-v2/train_loss.csv").read_bytes() == first
    for name, weight in tensors(folder / "out/run_step0004").items():
        assert torch.equal(weight, tensors(folder / "out/run_step0004-v2")[name])


def test_saving_sampling_and_checkpointing_do_not_change_the_training(trained, pt_file, tokenizer):
    plain = trained(ranks=2, LORA_DROPOUT=0.1, TOTAL_TRAIN_STEPS=4)
    more = {"SAVE_EVERY": 3, "SAMPLE_EVERY": 2, "GRADIENT_CHECKPOINTING": True}
    saving = trained(ranks=2, LORA_DROPOUT=0.1, TOTAL_TRAIN_STEPS=4, **more)
    assert losses(saving) == pytest.approx(losses(plain), abs=2e-6)
    assert {file.name for file in (saving / "out").iterdir()} == {"run_logs", "run_step0003", "run_step0004"}
    assert [file.name for file in (saving / "out/run_logs").iterdir() if file.is_dir()] == []
    rows = [json.loads(line) for line in (saving / "out/run_logs/samples.jsonl").read_text().splitlines()]
    prompts = [tokenizer.decode(sample["full_ids"][: sample["prompt_len"]]) for sample in read(pt_file)[:4]]
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, text) for step in (2, 4) for text in prompts]
    said = saving.with_name(f"{saving.name}.output").read_text().splitlines()
    start = [line for line in said if line.startswith("previews ")]
    assert start == ["previews     every 2 steps, answers to 4 training prompts: out/run_logs/samples.jsonl"]
    firsts = [" ".join(row["completion"].split()) for row in rows[::4]]  # of each of the two
    shown = [f"preview      step {s}: {t if len(t) <= 90 else t[:90] + '...'}" for s, t in zip((2, 4), firsts)]
    assert [line for line in said if line.startswith("preview ")] == shown
    assert (
        not (plain / "out/run_logs/samples.jsonl").exists()
        and "preview" not in plain.with_name(f"{plain.name}.output").read_text()
    )


@pytest.mark.parametrize("checkpointing, passes", [(False, 1), (True, 2)])
def test_gradient_checkpointing_runs_each_layer_again(base, checkpointing, passes):
    """In the first step already: a loaded model is in evaluation mode, in which it would do nothing."""
    knobs = {k: v for k, v in vars(train_blockwise).items() if k.isupper()} | KNOBS
    knobs = SimpleNamespace(**knobs | {"GRADIENT_CHECKPOINTING": checkpointing})
    model = engine.load_model(base, knobs, Ranks(0, 1, 0, 1, torch.device("cpu")))
    layers, calls = model.base_model.model.model.layers, []
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(torch.arange(8, 40)[None]).logits.square().mean().backward()
    assert len(calls) == passes * len(layers)


def test_previews_are_decoded_with_the_adapters(base, pt_file, tokenizer):
    model = get_peft_model(
        models.load_model(base, torch.float32), LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    knobs = SimpleNamespace(**KNOBS, DATA_PT=pt_file, MAX_SAMPLES=0, SAMPLE_EVERY=1)
    config = model.config
    samples = make_samples(read(pt_file), knobs, config)
    previews = Previews(base, config, samples, knobs)
    written = previews.rows(model, step=7)
    assert model.training
    merged, gen_length = model.merge_and_unload().eval(), previews.settings.gen_length
    answers = [len(sample["full_ids"]) - sample["prompt_len"] for sample in read(pt_file)[:4]]
    assert gen_length % 16 == 0 and 0 <= gen_length - max(answers) < 16
    for sample, row in zip(read(pt_file), written, strict=False):
        prompt = sample["full_ids"][: sample["prompt_len"]].tolist()
        ids, _ = decode.decode(merged, [prompt], Settings(gen_length, 16, gen_length))
        assert row["completion"] == decode.completion(tokenizer, ids[0].tolist(), [1, 7]) and row["step"] == 7
    config.max_position_embeddings = max(answers) + 10
    with pytest.raises(InputError, match="SAMPLE_EVERY=1: .* Set it to 0"):
        Previews(base, config, samples, knobs)


def test_ranks_draw_different_masks_and_dropout(trained, pt_file, tmp_path):
    """On copies of one sample, one a rank: if they drew alike, the number of supervised tokens would always be even."""
    torch.save(read(pt_file)[:1] * 24, tmp_path / "copies.pt")
    knobs = {"MICRO_BSIZE": 1, "GRAD_ACC": 1, "DATA_PT": tmp_path / "copies.pt"}
    folder = trained("train_fullseq.py", ranks=2, **knobs)
    assert {int(row["supervised_tokens"]) % 2 for row in read_csv(folder / "out/run_logs/metrics.csv")} == {0, 1}
    seeds = [derive_seed(42, "dropout", step, rank) for step in range(50) for rank in range(8)]
    assert len(set(seeds)) == len(seeds)


def test_bf16(trained):
    """The default precision, in which the adapters are bf16 too; RoPE must not be rounded to it."""
    fp32 = trained(ranks=1, GRAD_ACC=4)
    bf16 = trained(ranks=1, GRAD_ACC=4, BF16=True)
    assert json.loads((bf16 / "ds_zero2.json").read_text())["data_types"] == {"grad_accum_dtype": "fp32"}
    assert losses(bf16) == pytest.approx(losses(fp32), abs=0.1) and losses(bf16) != losses(fp32)


def test_epochs_draw_other_blocks_until_all_are_used(trained, pt_file):
    data = read(pt_file)
    blocks = sum(math.ceil((len(sample["full_ids"]) - sample["prompt_len"]) / 32) for sample in data)
    folder = trained(EPOCHS=9, BLOCK_SIZE=32, MICRO_BSIZE=4)
    output = folder.with_name(f"{folder.name}.output").read_text()
    assert f"{blocks} = 53 samples x 9 EPOCHS - {53 * 9 - blocks} with no block left" in output
    assert len(losses(folder)) == blocks // 8


def test_a_log_warmup_under_the_engine(trained):
    """LR is 0 in the first two steps, so the adapters have no effect before the fourth."""
    folder = trained(WARMUP_TYPE="log", WARMUP_RATIO=0.6, TOTAL_TRAIN_STEPS=6)
    lr = [float(row["lr"]) for row in read_csv(folder / "out/run_logs/metrics.csv")]
    cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * 2 / 3)) / 2
    by_hand = [0, 0, math.log(2) / math.log(3), 1, 0.01 + 0.99 * (1 + math.cos(math.pi / 3)) / 2, cosine]
    assert lr == pytest.approx([1e-2 * factor for factor in by_hand], rel=1e-5)
    plain = trained(TOTAL_TRAIN_STEPS=6)
    assert losses(folder)[0] == losses(plain)[0] and losses(folder)[1] != losses(plain)[1]


def test_save_dtype_and_the_saved_adapters(trained, base):
    """A float32 checkpoint has all of the update; its adapters on the base give the same logits."""
    folder = trained(SAVE_DTYPE="float32", TOTAL_TRAIN_STEPS=3)
    assert {weight.dtype for weight in tensors(folder / "out/run_step0003").values()} == {torch.float32}
    output = folder.with_name(f"{folder.name}.output").read_text()
    assert "100% of the update survived rounding to float32" in output
    merged, _ = decode.load(str(folder / "out/run_step0003"), "float32", torch.device("cpu"))
    adapted, _ = decode.load(str(base), "float32", torch.device("cpu"), str(folder / "out/run_step0003/adapter"))
    untuned, _ = decode.load(str(base), "float32", torch.device("cpu"))
    ids = torch.randint(8, 400, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged, adapted, untuned = (model(ids).logits for model in (merged, adapted, untuned))
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert (adapted - untuned).abs().max() > 0.1


def test_full_fine_tuning_saves_the_trained_weights(trained, base, pt_file):
    """Those of the plain loop, all of them, embeddings and norms too; and no adapters."""
    knobs = {"ranks": 2, "GRAD_ACC": 2, "LORA_RANK": 0, "SAVE_DTYPE": "float32", "SAMPLE_EVERY": 3}
    folder = trained(**knobs)
    _, model = literal_training(base, pt_file, steps=53 // 8, size=8, rank=0)
    before, after = tensors(base), tensors(folder / "out/run_step0006")
    assert not (folder / "out/run_step0006/adapter").exists()
    for name, weight in model.named_parameters():
        name = llada.hub_name(name)
        change = (after.pop(name) - before[name].float()).norm()
        gap = (weight - tensors(folder / "out/run_step0006")[name]).norm()
        assert change > 0 and gap < 0.02 * change, name
    assert not after
    output = folder.with_name(f"{folder.name}.output").read_text()
    assert "100% of the update survived rounding to float32" in output and "parameters are trained" in output
    assert "merged against unmerged" not in output
    assert (folder / "out/run_logs/samples.jsonl").read_text().count("\n") == 2 * 4


def test_full_fine_tuning_says_what_bf16_rounds_away(trained):
    """The optimizer's fp32 weights are rounded in the model already, before the checkpoint is written."""
    folder = trained(LORA_RANK=0, BF16=True, LR=1e-5, TOTAL_TRAIN_STEPS=2)
    output = folder.with_name(f"{folder.name}.output").read_text()
    kept = int(re.search(r"(\d+)% of the update survived rounding to bfloat16", output)[1])
    assert kept < 30  # steps of 1e-5 on weights of 0.1, where neighbours in bf16 are 5e-4 apart


# ---------------------------------------------------------------- bad input


def test_bad_input_ends_the_job_with_one_sentence_and_leaves_nothing(tmp_path, base, pt_file):
    """Under the real launcher; all other bad input: tests/faults/test_bad_input.py."""
    script = "train_blockwise.py"
    done = launch(2, script, *flags(script, base, pt_file, MICRO_BSIZE=14), cwd=tmp_path)
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    said = "53 usable samples (MAX_SAMPLES 6400) are fewer than one global batch of 56 = 14 MICRO_BSIZE"
    output = done.stdout + done.stderr
    assert output.count(said) == 1 and "Traceback" not in output


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """ended(script, *flags) -> what a script says that ends with an error; it must leave an empty folder empty."""

    def start(script, *flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert not list(tmp_path.iterdir())
        return end.value.code

    return start


def test_every_rank_ends_with_an_error_code(ended, monkeypatch, base):
    """Those that are not the first on their machine wait: the launcher ends them, and there is one sentence."""
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    said = ended("train_fullseq.py", "--DATA_PT=missing.pt", f"--MODEL_NAME={base}", "--MASK_ID=4")
    assert said.startswith("error: missing.pt does not exist") and slept == [10]


def test_without_the_launcher_it_says_how_to_start(ended):
    assert "deepspeed --num_gpus N" in ended("train_blockwise.py")


def knobs_for(base, **changes):
    defaults = {name: value for name, value in vars(train_blockwise).items() if name.isupper()}
    return SimpleNamespace(**defaults | KNOBS | {"MODEL_NAME": str(base)} | changes)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"MASK_ID": 5}, "MASK_ID=5, but .*mask_token_id 4"),
        ({"MAX_LEN": 2048}, "MAX_LEN=2048, but the model has 1024 positions"),
    ],
)
def test_knobs_are_compared_with_the_model(base, changes, said):
    with pytest.raises(InputError, match=said):
        engine.check_model(base, knobs_for(base, **changes))


def test_target_modules_must_be_linears_of_the_layers(base):
    engine.check_model(base, knobs_for(base))
    for name in ("attn_out", "lm_head", "proj"):  # the hub's name, one that cannot be merged, a part of a name
        with pytest.raises(InputError, match=f"TARGET_MODS: '{name}' matches no layer .* o_proj"):
            engine.check_model(base, knobs_for(base, TARGET_MODS=["q_proj", name]))


def test_all_folders_of_a_run_have_the_same_suffix(tmp_path):
    """Also when the run before left only logs, or only checkpoints: no two runs share a suffix."""
    start = str(tmp_path / "out (1)" / "run")
    folder = new_run(start)
    assert (folder.path, folder.suffix) == (tmp_path / "out (1)/run_logs", "")
    (tmp_path / "out (1)/run_step0003-v2").mkdir()
    (tmp_path / "out (1)/other_step0003-v3").mkdir()
    folder = new_run(start)
    assert (folder.path, folder.suffix) == (tmp_path / "out (1)/run_logs-v3", "-v3")
    assert folder.checkpoint(7) == tmp_path / "out (1)/run_step0007-v3"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        new_run(str(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    "config, said",
    [
        ({"mask_token_id": None, "embedding_size": 4, "vocab_size": 4}, "MASK_ID=4 is outside"),
        ({"pad_token_id": None}, "pad_token_id"),
    ],
)
def test_the_config_must_allow_training(base, tmp_path, config, said, monkeypatch):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    monkeypatch.setattr(models, "check_tensors", lambda folder, config: None)  # the weights are not what this is about
    with pytest.raises(InputError, match=said):
        engine.check_model(tmp_path / "base", knobs_for(base))


def test_more_steps_than_the_samples_give_are_refused(base):
    ranks = Ranks(0, 2, 0, 2, torch.device("cpu"))
    samples = Samples(torch.zeros(53, 192), torch.zeros(53), torch.ones(53), torch.arange(53), unanswered=0)
    plan = torch.zeros(53, 2)
    assert trainer.plan_steps(knobs_for(base), ranks, samples, plan) == 6
    assert trainer.plan_steps(knobs_for(base, TOTAL_TRAIN_STEPS=2), ranks, samples, plan) == 2
    with pytest.raises(InputError, match="TOTAL_TRAIN_STEPS=7 is more than the 6 steps"):
        trainer.plan_steps(knobs_for(base, TOTAL_TRAIN_STEPS=7), ranks, samples, plan)
