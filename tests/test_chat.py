"""chat.py: in a real terminal, through a pipe, and what it draws."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import torch
from conftest import ROOT, run

import chat
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import base as models
from blockwise.prompts import prompt_ids

MASK, ENDS = 4, [1, 7]
SPEED = r"(\d+)\s+tokens,\s+([\d.]+)\s+per\s+second,\s+([\d.]+)\s+forward\s+passes\s+per\s+token"
LONG = ("--gen_length", "512", "--block_length", "32", "--steps", "512")


class Terminal:
    """chat.py in a pseudo-terminal."""

    def __init__(self, *flags, rows=25, columns=80):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "chat.py"), *map(str, flags)], stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, env=os.environ | {"TERM": "xterm"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        os.close(slave)
        self.unread = b""

    def wait_for(self, text, seconds=120):
        """Reads until the text has appeared, and returns all up to its end; what came after it is for the next call."""
        end = time.time() + seconds
        while text.encode() not in self.unread:
            assert time.time() < end, f"no {text!r} in {self.unread!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.unread += os.read(self.master, 65536)
        length = self.unread.index(text.encode()) + len(text.encode())
        seen, self.unread = self.unread[:length], self.unread[length:]
        return seen.decode(errors="replace")

    def type(self, text):
        os.write(self.master, text.encode())


def test_ctrl_c_stops_an_answer_and_then_the_conversation(base):
    terminal = Terminal("--model", base, *LONG)
    greeting = terminal.wait_for("> ")
    assert greeting.split("\r\n")[-4:] == [
        f"{base}: blocks of 32 tokens, 512 tokens for an answer.",
        "Ctrl-C stops an answer; /reset begins a new conversation, /quit ends this one.", "", "> ",
    ]  # fmt: skip
    terminal.type("Ada has 3 pens.\n")
    terminal.wait_for("·")  # masks that are not written yet
    terminal.process.send_signal(2)
    terminal.wait_for("(stopped)")
    assert re.search(SPEED, terminal.wait_for("> "))
    time.sleep(1)  # until it waits for the line
    terminal.process.send_signal(2)
    assert terminal.process.wait(timeout=30) == 0


def test_an_answer_higher_than_the_terminal_is_drawn_in_it_and_printed_whole_at_the_end(base, tokenizer):
    flags = ("--gen_length", "48", "--block_length", "48", "--steps", "24")
    terminal = Terminal("--model", base, *flags, rows=5, columns=20)
    terminal.wait_for("> ")
    terminal.type("Ada has 3 pens.\n")
    seen = terminal.wait_for("\n> ")
    model = models.load_model(base, torch.float32).eval()
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": "Ada has 3 pens."}])
    ids, _ = decode.decode(model, [prompt], Settings(48, 48, 24))
    answer = decode.completion(tokenizer, ids[0].tolist(), ENDS)
    assert len(answer) > 5 * 20
    ups = [len(run) // len("\x1b[1A\x1b[2K") for run in re.findall(r"(?:\x1b\[1A\x1b\[2K)+", seen)]
    assert len(ups) > 4 and max(ups) <= 4, "a frame was higher than the terminal: the rest of it would stay there"
    last = re.split(r"\x1b\[\?25h", seen)[-1]  # once the drawing is over
    last, dim, speed = last.partition("\x1b[2m")
    last, speed = (re.sub(r"\x1b\[[0-9;?]*\w", "", part) for part in (last, speed))
    assert "".join(last.split()) == "".join(answer.split()) and dim
    found = re.search(SPEED, speed)
    number = decode.length(ids[0].tolist(), ENDS)
    assert int(found[1]) == number and found[3] == f"{24 / number:.2f}"
    assert 0 < number / float(found[2]) < 100  # the seconds that it took
    terminal.type("/reset\n")
    terminal.wait_for("(This is a new conversation.)")
    terminal.type("/quit\n")
    assert terminal.process.wait(timeout=30) == 0


def test_lines_of_a_pipe_are_turns_or_commands_and_answers_come_block_by_block(base, tokenizer, tmp_path):
    flags = ("--gen_length", "24", "--block_length", "8", "--steps", "24")
    command = [sys.executable, str(ROOT / "chat.py"), "--model", str(base), *flags]
    said = "Ada has 3 pens.\n\nAnd now?\n/reset\nAnd now?\n/quit\nThis is not read.\n"
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    model, messages, wanted = models.load_model(base, torch.float32).eval(), [], []
    for text in ("Ada has 3 pens.", "And now?", "/reset", "And now?"):
        if text == "/reset":
            messages = []
            continue
        messages.append({"role": "user", "content": text})
        ids, _ = decode.decode(model, [prompt_ids(tokenizer, messages)], Settings(24, 8, 24))
        messages.append({"role": "assistant", "content": decode.completion(tokenizer, ids[0].tolist(), ENDS)})
        for block in range(3):
            if not any(token in ENDS for token in ids[0, : block * 8].tolist()):
                part = tokenizer.decode(ids[0, block * 8 : block * 8 + 8], skip_special_tokens=True)
                wanted.append(f"block {block + 1}  " + part.replace("\n", "⏎"))
    assert done.stdout == "".join(line + "\n" for line in wanted)
    assert "".join(wanted[3:6]) != "".join(wanted[6:]), "the model has forgotten the first question"


def test_a_block_is_printed_up_to_its_end(tokenizer, capsys):
    """Conv decoding writes the whole answer as one block, and what stands behind its end is no answer."""
    a, b, c = tokenizer("3 + 4")["input_ids"][:3]
    answers = [([a, MASK, 7, MASK, c, c], 1), ([a, b, 7, c, c, c], 2)]
    assert chat.show_blocks(iter(answers), tokenizer, MASK, ENDS, 6) == answers[1][0]
    assert capsys.readouterr().out == f"block 1  {tokenizer.decode([a, b])}\n"


def test_with_an_adapter_answers_are_those_of_base_and_adapters(base, adapter, adapted, tokenizer):
    flags = ("--adapter", str(adapter), "--gen_length", "16", "--block_length", "16", "--steps", "16")
    command = [sys.executable, str(ROOT / "chat.py"), "--model", str(base), *flags]
    done = subprocess.run(command, input="Ada has 3 pens.\n", capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    prompt, said = prompt_ids(tokenizer, [{"role": "user", "content": "Ada has 3 pens."}]), []
    for model in (adapted, models.load_model(base, torch.float32).eval()):
        ids, _ = decode.decode(model, [prompt], Settings(16, 16, 16))
        said.append("block 1  " + tokenizer.decode(ids[0], skip_special_tokens=True).replace("\n", "⏎") + "\n")
    assert done.stdout == said[0] != said[1]


def test_a_turn_that_is_not_utf8_is_answered(base):
    command = [sys.executable, str(ROOT / "chat.py"), "--model", str(base), "--gen_length", "8", "--block_length", "8"]
    done = subprocess.run([*command, "--steps", "8"], input=b"ab\xff\n", capture_output=True, timeout=100)
    assert done.returncode == 0 and done.stdout.startswith(b"block 1"), done.stderr


def test_drawing_shows_what_is_written_and_the_masks_of_its_block(tokenizer):
    a, b, c = tokenizer("3 + 4")["input_ids"][:3]
    assert chat.drawing([MASK] * 8, tokenizer, MASK, ENDS, 4).plain == "····"
    assert (
        chat.drawing([a, MASK, c, MASK, *[MASK] * 4], tokenizer, MASK, ENDS, 4).plain
        == "3· +·"[:2] + tokenizer.decode([c]) + "·"
    )
    assert (
        chat.drawing([a, b, c, MASK, *[MASK] * 4], tokenizer, MASK, ENDS, 4).plain == tokenizer.decode([a, b, c]) + "·"
    )
    shorter = chat.drawing([a, b, c, a, MASK, MASK], tokenizer, MASK, ENDS, 4).plain  # its last block has 2 tokens
    assert shorter == tokenizer.decode([a, b, c, a]) + "··"
    done = [a, b, c, 7, 1, 1, a, 1]
    assert chat.drawing(done, tokenizer, MASK, ENDS, 4).plain == tokenizer.decode([a, b, c])


def test_a_long_conversation_loses_its_oldest_turns_only(base, tokenizer, capsys):
    model = models.load_model(base, torch.float32)
    turn = [{"role": "user", "content": "pens " * 30}, {"role": "assistant", "content": "shells " * 30}]
    conversation = [*turn * 3, {"role": "user", "content": "And now?"}]
    messages, ids = chat.fit(conversation, model, tokenizer, Settings(512, 32, 512))
    assert messages == conversation[-len(messages) :] and 1 < len(messages) < 7 and len(messages) % 2
    assert ids == prompt_ids(tokenizer, messages) and len(ids) + 512 <= 1024
    longer = prompt_ids(tokenizer, conversation[-len(messages) - 2 :])
    assert len(longer) + 512 > 1024 and "too long" in capsys.readouterr().out


def test_bad_input_is_one_sentence(base, tmp_path):
    for flags, said in (
        (("--model", base, "--steps", 5), "steps 5 must be at least 8, one for each block"),
        (("--model", tmp_path), "is not the folder of a model: it has neither config.json nor a tokenizer.\n"),
        (("--model", base, "--adapter", tmp_path), "adapter_config.json is missing"),
    ):
        done = run("chat.py", *flags)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
