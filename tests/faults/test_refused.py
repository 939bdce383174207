"""--RESUME=True where nothing can be resumed: one sentence that names the difference, and nothing is touched."""

import json
import re
import shutil
import signal

import pytest
import torch
from conftest import TRAINING, locked
from outcome import check_finished, results
from safetensors.torch import load_file, save_file

from blockwise.run import run_folder


@pytest.fixture(scope="module")
def stopped(forked, tmp_path_factory):
    """A run that was stopped after its second step."""
    folder = tmp_path_factory.mktemp("stopped")
    done = forked(folder, faults={"at": ["step 2$", signal.SIGTERM]})
    assert done.codes == [75], done.output
    return folder


@pytest.fixture
def reference(uninterrupted):
    return uninterrupted(ranks=1)


def pytest_generate_tests(metafunc):
    if "what" in metafunc.fixturenames:
        sample = ("LR", "ranks", "samples", "model")
        metafunc.parametrize("what", DIFFERENT if metafunc.config.getoption("full") else sample)


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def other_samples(base, pt_file):
    samples = torch.load(pt_file, weights_only=True)
    samples[-1]["full_ids"][-1] = samples[-1]["full_ids"][-2]
    torch.save(samples, pt_file)


def other_base(base, pt_file):
    file = sorted(base.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def other_config(base, pt_file):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-5}))


DIFFERENT = {  # what is given, or done to copies of base and data, and what the sentence says
    "LR": ({"LR": 2e-2}, "LR was 0.01, now it is 0.02"),
    "SEED": ({"SEED": 1}, "SEED was 42, now it is 1"),
    "GRAD_ACC": ({"GRAD_ACC": 1}, "GRAD_ACC was 2, now it is 1"),
    "BF16": ({"BF16": True}, "BF16 was False, now it is True"),
    "steps": ({"TOTAL_TRAIN_STEPS": 5}, "total_steps was 4, now it is 5"),
    "SAVE_EVERY": ({"SAVE_EVERY": 2}, "SAVE_EVERY was 3, now it is 2"),
    "layers": ({"TARGET_MODS": '["q_proj"]'}, "TARGET_MODS was ['q_proj', 'k_proj'"),
    "ranks": ({"ranks": 2}, "ranks was 1, now it is 2"),
    "script": ({"script": "train_fullseq.py"}, "script was 'train_blockwise.py', now it is 'train_fullseq.py'"),
    "VAL_PT": ({"VAL_PT": "samples.pt"}, "VAL_PT was '', now it is 'samples.pt'"),
    "samples": (other_samples, "the content of"),
    "model": (other_base, "the content of"),
    "config": (other_config, "the content of"),
}


def test_another_run_is_not_resumed(forked, stopped, base, pt_file, tmp_path, record_property, what):
    record_property("fault", "resumes refused")
    change, said = DIFFERENT[what]
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    shutil.copy(pt_file, folder / "samples.pt")
    if callable(change):  # what the run was started with has other content now
        shutil.copytree(base, tmp_path / "base")
        shutil.copy(pt_file, tmp_path / "samples.pt")
        path = folder / "out/run ö_logs/ablation_config.json"
        names = {"MODEL_NAME": str(tmp_path / "base"), "DATA_PT": str(tmp_path / "samples.pt")}
        path.write_text(json.dumps(json.loads(path.read_text()) | names))
        change(tmp_path / "base", tmp_path / "samples.pt")
        change = names
    before = snapshot(folder / "out")
    done = forked(folder, RESUME=True, **change)
    assert set(done.codes) == {1} and f"out/run ö_logs is another run: {said}" in done.output, done.output
    assert "Traceback" not in done.output and snapshot(folder / "out") == before


def test_what_changes_no_number_may_change(forked, stopped, reference, tmp_path, record_property):
    """Other knobs of resuming, knobs that did not exist, and another version of a package, of which a line warns."""
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run/out/run ö_logs/ablation_config.json"
    constants = json.loads(path.read_text())
    constants["derived"]["torch"] = f"1{constants['derived']['torch']}"
    for name in ("VAL_PT", "VAL_EVERY", "BASE_4BIT", "TRACKER"):  # as in a run of a version without these knobs
        del constants[name]
    path.write_text(json.dumps(constants))
    done = forked(tmp_path / "run", RESUME=True, RESUME_EVERY=0, MAX_BAD_STEPS=5)
    assert done.codes == [0] and "warning      the run was started with torch 1" in done.output
    check_finished(tmp_path / "run/out", reference / "out")
    now = json.loads(path.read_text())  # the constants in force, and what the run was started with
    assert (now["RESUME"], now["RESUME_EVERY"], now["MAX_BAD_STEPS"]) == (True, 0, 5)
    assert now["LR"] == TRAINING["LR"] and now["derived"]["torch"].startswith("1")


def test_a_finished_run_is_not_restarted(forked, uninterrupted, tmp_path, record_property):
    """That is no error, as a job script may start it once too often; but another training has not been done yet."""
    record_property("fault", "resumes refused")
    shutil.copytree(uninterrupted(ranks=2) / "out", tmp_path / "run/out")
    before = snapshot(tmp_path / "run")
    done = forked(tmp_path / "run", 2, RESUME=True)
    said = "resume       the run of out/run ö_logs is finished, out/run ö_step0004/ is its checkpoint; start a new one"
    assert done.codes == [0, 0] and done.output.count(said) == 1 and "error" not in done.output, done.output
    done = forked(tmp_path / "run", 2, RESUME=True, LR=2e-2)
    assert done.codes == [1, 1] and "out/run ö_logs is another run: LR was 0.01, now it is 0.02" in done.output
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_of_which_a_process_is_alive_is_not_resumed(forked, stopped, tmp_path, record_property, shared):
    """shared: it is a rank of the run, as all ranks share the lock; else it is the first one, before they do."""
    record_property("fault", "resumes refused")
    shutil.copytree(stopped, tmp_path / "run")
    before = snapshot(tmp_path / "run/out")
    with locked(tmp_path / "run/out/run ö_logs", shared):
        done = forked(tmp_path / "run", RESUME=True)
    assert done.codes == [1] and "another run, or a process that it has left, works in out/run ö_logs" in done.output
    assert snapshot(tmp_path / "run/out") == before


@pytest.mark.parametrize("content", ["", "[]", '{"derived": {}}', '{"LR": 1'])
def test_damaged_constants(forked, stopped, tmp_path, record_property, content):
    record_property("fault", "resumes refused")
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run/out/run ö_logs/ablation_config.json"
    path.write_text(content)
    done = forked(tmp_path / "run", RESUME=True)
    assert done.codes == [1] and "ablation_config.json is damaged; start a new run" in done.output
    assert path.read_text() == content


def test_without_a_run_a_new_one_starts(forked, reference, tmp_path):
    done = forked(tmp_path / "run", RESUME=True)
    assert done.codes == [0] and "there is no run of out/run ö yet: this one is new" in done.output
    check_finished(tmp_path / "run/out", reference / "out")


def test_a_run_without_a_resume_point_restarts_in_its_folder(forked, reference, tmp_path):
    killed = forked(tmp_path / "run", faults={"at": ["step 2$", signal.SIGKILL]}, RESUME_EVERY=0)
    assert killed.codes == [-signal.SIGKILL] and (tmp_path / "run/out/run ö_logs/train_loss.csv").stat().st_size
    done = forked(tmp_path / "run", RESUME=True)
    assert done.codes == [0] and "has no resume point yet: it starts at step 1" in done.output
    check_finished(tmp_path / "run/out", reference / "out")


def test_a_torn_line_and_a_missing_checkpoint_come_back(forked, reference, tmp_path):
    """Stopped at a step of SAVE_EVERY: its checkpoint is made by the resumed run. The CSV ends in half a line."""
    stopped = forked(tmp_path / "run", faults={"at": ["step 3$", signal.SIGUSR1]})
    assert stopped.codes == [75] and not list((tmp_path / "run/out").glob("*_step0003"))
    with open(tmp_path / "run/out/run ö_logs/train_loss.csv", "a") as file:
        file.write("4,5.9")
    assert forked(tmp_path / "run", RESUME=True).codes == [0]
    check_finished(tmp_path / "run/out", reference / "out")


def test_killed_while_removing_its_last_resume_point(forked, reference, tmp_path, record_property):
    """Its last checkpoint is there: nothing is trained again, and what is left of the point goes."""
    record_property("fault", "kill points: after the last checkpoint")
    shutil.copytree(reference / "out", tmp_path / "run/out")
    (tmp_path / "run/out/run ö_logs/resume_step0004.unfinished").mkdir()
    done = forked(tmp_path / "run", RESUME=True, faults={"trace": str(tmp_path / "trace")})
    assert done.codes == [0] and " step " not in (tmp_path / "trace0").read_text()
    check_finished(tmp_path / "run/out", reference / "out")


def test_which_run_is_resumed(tmp_path):
    """The newest that is not finished, or else the newest; the folders of other names do not count."""

    def make(name, steps, finished):
        folder = tmp_path / name
        folder.mkdir()
        (folder / run_folder.CONSTANTS).write_text(json.dumps({"derived": {"total_steps": steps}}))
        if finished:
            (tmp_path / name.replace("_logs", f"_step{steps:04d}")).mkdir()

    def found():
        run = run_folder.run_to_resume(str(tmp_path / "run (1)"))
        return run and (run.path, run.suffix)

    assert found() is None
    make("run (1)_logs", 4, finished=False)
    make("run (1)_logs-v2", 4, finished=True)
    make("run (1)_logs-v10", 7, finished=False)
    make("run (1) b_logs-v11", 7, finished=False)
    assert found() == (tmp_path / "run (1)_logs-v10", "-v10")
    (tmp_path / "run (1)_step0007-v10").mkdir()
    assert found() == (tmp_path / "run (1)_logs", "")
    (tmp_path / "run (1)_logs-v10/resume_step0007").mkdir()  # killed before it could remove its last resume point
    assert found() == (tmp_path / "run (1)_logs-v10", "-v10")
    shutil.rmtree(tmp_path / "run (1)_logs-v10/resume_step0007")
    (tmp_path / "run (1)_step0004").mkdir()
    assert found() == (tmp_path / "run (1)_logs-v10", "-v10")


def test_machines_that_do_not_share_the_folder(forked, tmp_path, record_property):
    record_property("fault", "runs refused")
    (tmp_path / "elsewhere").mkdir()
    done = forked(tmp_path / "run", 2, faults={"rank": 1, "elsewhere": str(tmp_path / "elsewhere")})
    assert done.codes == [1, 1] and "CKPT_DIR must be in a folder that all share (rank 1)" in done.output
    assert not list((tmp_path / "run/out").glob("*_step*")) and not list((tmp_path / "elsewhere").iterdir())


def test_two_runs_started_together_do_not_mix(forked, reference, tmp_path, record_property):
    """In one folder, with the same CKPT_DIR: each has folders of its own, with the results of a run alone."""
    record_property("fault", "runs started together")
    done = forked(tmp_path / "run", runs=2)
    assert done.codes == [0, 0], done.output
    alone = results(reference / "out")
    second = {re.sub(r"(_logs|_step\d{4})/", r"\1-v2/", name): content for name, content in alone.items()}
    assert results(tmp_path / "run/out") == alone | second and len(second) == len(alone)
