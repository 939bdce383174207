"""What runs in the two child processes of sandbox.py: the program of an answer, and the tests that call it.

    python -s -P sandboxed.py program|tests CPU_SECONDS READ_FROM WRITE_TO

Both give up, for good, whatever a function of numbers and texts does not need: network, other processes, signals, and
all files but those of Python, which they can only read. That needs no rights, but Linux with seccomp and Landlock.

The tests are in a process of their own, and only plain data comes there from the program: numbers, texts, lists and the
like, as JSON. So a program cannot pass a test by ending early, by changing what `==` or `assert` do, or by looking
for the values that are expected. What it returns besides plain data, such as instances of its classes, the tests can
only call and take attributes of; to them it equals nothing. Values are copies; what a function does to a list that it
is given, the tests see after the call.

Imports nothing of the repository.
"""

import builtins
import collections
import ctypes
import json
import numbers
import os
import resource
import signal
import struct
import sys
import types

MEMORY, LINE = 10**9, 2**22  # bytes: of a process, and of a message
CALL_SECONDS = 1.0  # CPU time of one call of the program
COPIED = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}


# ---------------------------------------------------------------- what a process may do

libc = ctypes.CDLL(None, use_errno=True)
DEATH_SIGNAL, NO_NEW_PRIVILEGES, SECCOMP = 1, 38, 22  # of prctl
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of FORBIDDEN, and Linux's number for it
FORBIDDEN = {  # calls of the system; those that have no number on aarch64 do not exist there
    # other processes and threads, and the network
    "clone": (56, 220), "clone3": (435, 435), "fork": (57,), "vfork": (58,), "socket": (41, 198),
    # what reaches into other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "prlimit64": (302, 261), "setrlimit": (160, 164),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    # what outlives the process
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "add_key": (248, 217),
    "keyctl": (250, 219),
    # attributes and lengths of files, which Landlock, or its first versions, leave alone
    "chmod": (90,), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92,),
    "fchown": (93, 55), "lchown": (94,), "fchownat": (260, 54), "utime": (132,), "utimes": (235,),
    "utimensat": (280, 88), "futimesat": (261,), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "truncate": (76, 45), "ftruncate": (77, 46),
    # ways around all this
    "prctl": (157, 167), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "move_mount": (429, 429),
    "io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = map(ctypes.c_long, (444, 445, 446))  # Landlock's calls, on all machines
READ_FILE, READ_FOLDER, WRITE_FILE = 4, 8, 2


def call(function, *args) -> int:
    """Calls a function of the system's library. Raises OSError."""
    result = function(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def confine(cpu_seconds: int) -> None:
    """Takes from this process what it can do without. Raises OSError where the system cannot do that."""
    call(libc.prctl, DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # when the training ends
    limits = {"CPU": cpu_seconds, "AS": MEMORY, "FSIZE": 0, "NOFILE": 64, "CORE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    call(libc.capset, ctypes.byref((ctypes.c_uint32 * 2)(0x20080522, 0)), ctypes.byref((ctypes.c_uint32 * 6)()))
    call(libc.prctl, NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    keep_files([sys.base_prefix, sys.prefix, "/usr", "/lib", "/lib64"])
    column, machine = MACHINES[os.uname().machine]
    forbid([found[column] for found in FORBIDDEN.values() if column < len(found)], machine)


def keep_files(readable: list[str]) -> None:
    """From now on, files can only be read, and only in these folders (Landlock). Raises OSError."""
    version = call(libc.syscall, CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    everything = (1 << {1: 13, 2: 14}.get(version, 15)) - 1  # all that this version can forbid
    ruleset = call(libc.syscall, CREATE_RULESET, ctypes.byref(ctypes.c_uint64(everything)), ctypes.c_size_t(8), 0)
    allowed = [(path, READ_FILE | READ_FOLDER) for path in readable if os.path.isdir(path)]
    for path, access in [*allowed, (os.devnull, READ_FILE | WRITE_FILE), ("/dev/urandom", READ_FILE)]:
        place = os.open(path, os.O_PATH)
        call(libc.syscall, ADD_RULE, ruleset, 1, struct.pack("=Qi", access, place), 0)
        os.close(place)
    call(libc.syscall, RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def forbid(calls: list[int], machine: int) -> None:
    """From now on, these calls of the system fail with EPERM, as do all of other machines (seccomp). Raises OSError.

    The filter is a program of Linux's packet filter: load, jump if equal (at least), return.
    """
    checks = [(0x15, number) for number in calls] + [(0x35, 0x40000000)]  # the last one: x86-64's second interface
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, machine), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    lines += [(test, len(checks) - i, 0, number) for i, (test, number) in enumerate(checks)]
    lines += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]  # allowed, and EPERM
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    call(libc.prctl, SECCOMP, 2, struct.pack("HP", len(lines), ctypes.addressof(code)), 0, 0)


# ---------------------------------------------------------------- values between the two processes


def pack(value: object, refer) -> object:
    """A value as JSON has it. refer: an object that is no plain data -> what stands for it."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):  # numpy's, too
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [pack(part, refer) for part in value]
    if isinstance(value, dict):
        return {"dict": [[pack(key, refer), pack(part, refer)] for key, part in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    for name, kind in COPIED.items():
        if isinstance(value, kind):
            return {name: [pack(part, refer) for part in value]}
    return {"object": refer(value)}


def unpack(packed: object, find) -> object:
    """The value that `pack` was given. find: what stands for an object -> the object."""
    if isinstance(packed, list):
        return [unpack(part, find) for part in packed]
    if not isinstance(packed, dict):
        return packed
    ((name, content),) = packed.items()
    if name == "dict":
        return {unpack(key, find): unpack(part, find) for key, part in content}
    if name == "complex":
        return complex(*content)
    if name == "bytes":
        return bytes.fromhex(content)
    return find(content) if name == "object" else COPIED[name](unpack(part, find) for part in content)


# ---------------------------------------------------------------- the program

OPERATIONS = {  # what the tests can do with an object of the program
    "call": lambda function, args, options: function(*args, **options),
    "getattr": lambda owner, args, _: getattr(owner, *args),
    "list": lambda values, *_: list(values),
    "len": lambda values, *_: len(values),
    "getitem": lambda values, args, _: values[args[0]],
}


def serve(source: dict, requests, replies) -> None:
    """Runs a program and then, for each line of `requests`, what it asks for. Ends with the last one."""
    objects = []
    signal.signal(signal.SIGPROF, too_long)

    def refer(value):
        objects.append(value)
        return len(objects) - 1

    def load():
        namespace = {"__name__": "solution"}
        exec(compile(source["program"], "solution.py", "exec"), namespace)
        return {"value": {name: pack(v, refer) for name, v in namespace.items() if not name.startswith("__")}}

    def answer(operation, target, args, options):
        before, find = json.dumps(args), objects.__getitem__
        args, options = unpack(args, find), {name: unpack(option, find) for name, option in options.items()}
        value = pack(OPERATIONS[operation](find(target), args, options), refer)
        after = pack(args, refer)
        return {"value": value} | ({} if json.dumps(after) == before else {"args": after})

    def attempt(function, *args):
        try:
            signal.setitimer(signal.ITIMER_PROF, CALL_SECONDS)
            reply = json.dumps(function(*args))
        except BaseException as error:  # whatever it is, it is the program's, and the tests may expect it
            reply = json.dumps({"error": [type(error).__name__, str(error)[:1000]]})
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply.encode() + b"\n")
        replies.flush()

    attempt(load)
    for line in requests:
        attempt(answer, *json.loads(line))


def too_long(*_):
    raise TimeoutError(f"the call has taken more than {CALL_SECONDS} s")


# ---------------------------------------------------------------- the tests


class Remote:
    """An object of the program that is no plain data: a function, a class, or an instance of one."""

    def __init__(self, ask, number):
        self._ask, self._number = ask, number

    def __call__(self, *args, **options):
        return self._ask("call", self, args, options)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", self, (name,))

    def __iter__(self):
        return iter(self._ask("list", self))

    def __len__(self):
        return self._ask("len", self)

    def __getitem__(self, key):
        return self._ask("getitem", self, (key,))


class Program:
    """The program's process, as the tests see it."""

    def __init__(self, requests, replies):
        self.requests, self.replies = requests, replies

    def receive(self) -> dict:
        """The next reply. Raises EOFError if there is none, and the program's own exceptions."""
        line = self.replies.readline(LINE)
        if not line.endswith(b"\n"):
            raise EOFError("the program has ended, or its answer is too long")
        reply = json.loads(line)
        if "error" in reply:
            name, text = reply["error"]
            kind = getattr(builtins, name, None)
            raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(text)
        return reply

    def names(self) -> dict:
        """What the program defines. Call it once, first. Raises what receive raises."""
        return {name: unpack(value, self.find) for name, value in self.receive()["value"].items()}

    def find(self, number: int) -> Remote:
        return Remote(self.ask, number)

    def ask(self, operation: str, target: Remote, args: tuple = (), options: dict | None = None):
        """Has the program do something, and takes over what it has done to lists and the like among `args`."""
        packed = [pack(arg, refer) for arg in args], {name: pack(arg, refer) for name, arg in (options or {}).items()}
        self.requests.write(json.dumps([operation, target._number, *packed]).encode() + b"\n")
        self.requests.flush()
        reply = self.receive()
        for old, new in zip(args, reply.get("args", [])):
            new = unpack(new, self.find)
            if isinstance(old, list):
                old[:] = new
            elif isinstance(old, dict | set):
                old.clear()
                old.update(new)
        return unpack(reply["value"], self.find)


def refer(value: object) -> int:
    """What stands for an object of the program; objects of the tests cannot be given to it. Raises TypeError."""
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a {type(value).__name__} of the tests cannot be given to the program")


def run_tests(source: dict, program: Program, report: int) -> None:
    """Runs the tests one by one and writes 1 to `report` for each that raises nothing, else 0."""
    names = program.names()
    solution = sys.modules["solution"] = types.ModuleType("solution")
    vars(solution).update(names)
    known = sys.stdlib_module_names | vars(builtins).keys()  # abs and math are not what the program makes of them
    namespace = {name: value for name, value in names.items() if name not in known}
    namespace["__name__"] = "tests"
    exec(compile(source["before"], "tests.py", "exec"), namespace)
    if (wanted := source["wanted"]) in names:
        namespace[wanted] = names[wanted]
    for test in source["tests"]:
        try:
            exec(compile(test, "tests.py", "exec"), namespace)
            os.write(report, b"1")
        except BaseException:  # an assert that fails, and whatever else a test may raise
            os.write(report, b"0")


def main():
    role, cpu_seconds, source, target = sys.argv[1:]
    content = json.load(sys.stdin)
    null = os.open(os.devnull, os.O_RDWR)
    report = os.dup(1)  # of the program's process, this is /dev/null
    for stream in range(3):
        os.dup2(null, stream)
    source, target = os.fdopen(int(source), "rb"), os.fdopen(int(target), "wb")
    confine(int(cpu_seconds))
    if role == "program":
        serve(content, source, target)
    else:
        run_tests(content, Program(target, source), report)
    os._exit(0)


if __name__ == "__main__":
    main()
