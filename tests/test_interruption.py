"""Ctrl-C and SIGTERM: one line on standard error, exit code 130 or 143, nothing left behind, wherever Python stands.

Processes send the signal to themselves, at places that real runs were caught in. They run a command of their own, so
that nothing needs JAX, which takes most of a command's start.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ENDS = {  # exit code, standard output, standard error
    signal.SIGINT: (130, "", "emu3-jax: interrupted\n"),
    signal.SIGTERM: (143, "", "emu3-jax: terminated\n"),
}
both = pytest.mark.parametrize("number", ENDS, ids=["Ctrl-C", "SIGTERM"])

# The command `doctor` is replaced by `run`; `press` is the signal NUMBER.
HEAD = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a script it is ignored
def press():
    os.kill(os.getpid(), NUMBER)
def start(run):
    from emu3_jax.cli import doctor, main
    main.start_jax = lambda: None
    doctor.run = run
    sys.argv = ["emu3-jax", "doctor", "x"]
    import emu3_jax.__main__
    emu3_jax.__main__.program()
"""


def process(code, number=signal.SIGINT, **options):
    """Starts Python with `code` after `HEAD`; standard error is a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", f"NUMBER = {int(number)}" + HEAD + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ends(started, limit=30):
    out, err = started.communicate(timeout=limit)
    return started.returncode, out, err


@both
@pytest.mark.parametrize(
    "code",
    {
        "in the command": """
            def run(options):
                from emu3_jax.files import files_into
                with files_into("out") as directory:
                    (directory / "file").write_text("x")
                    press()
                    time.sleep(60)
        """,
        "in a callback of the garbage collector": """
            import gc
            def run(options):
                gc.callbacks.append(lambda phase, info: phase == "start" and not gc.callbacks.clear() and press())
                gc.collect()
                time.sleep(60)
        """,
        "in a destructor": """
            class Dying:
                def __del__(self):
                    press()
                    time.sleep(0.1)
            def run(options):
                dying = Dying()
                del dying
                time.sleep(60)
        """,
        "made another exception": """
            def run(options):
                try:
                    press()
                    time.sleep(60)
                except KeyboardInterrupt as error:
                    raise RuntimeError("callback failed") from error
        """,
        "made an error of bad input": """
            def run(options):
                from emu3_jax.errors import Emu3Error
                try:
                    press()
                    time.sleep(60)
                except KeyboardInterrupt as error:
                    raise Emu3Error("the file is damaged") from error
        """,
        "swallowed, and pressed again": """
            def run(options):
                try:
                    press()
                    time.sleep(60)
                except KeyboardInterrupt:
                    time.sleep(0.5)
                threading.Thread(target=press).start()
                while True:  # the exception of the second one is swallowed too
                    try:
                        time.sleep(60)
                    except KeyboardInterrupt:
                        pass
        """,
        "swallowed, and nothing more": """
            from emu3_jax.cli import interruption
            interruption._PATIENCE = 0.5
            def run(options):
                while True:
                    try:
                        press()
                        time.sleep(60)
                    except KeyboardInterrupt:
                        time.sleep(60)
        """,
        "twice by one press": """
            def run(options):
                from emu3_jax.files import files_into
                with files_into("out") as directory:
                    try:
                        press()
                        time.sleep(60)
                    finally:
                        press()
                        time.sleep(0.1)
        """,
        "within an import": """
            import pathlib
            def run(options):
                pathlib.Path("compiled.py").write_text(
                    "import __main__\\ntry:\\n    __main__.press()\\n    [i for i in range(10**6)]\\n"
                    "except KeyboardInterrupt:\\n    raise SystemError('crash')\\n"
                )
                sys.path.insert(0, "")
                import compiled
        """,
        "while threads fail": """
            def run(options):
                def fail():
                    time.sleep(0.05)
                    raise ValueError("the loop is closed")
                thread = threading.Thread(target=fail)
                thread.start()
                try:
                    press()
                    time.sleep(60)
                finally:
                    thread.join()
        """,
        "while commands are imported": """
            class Finder:
                def find_spec(self, name, path=None, target=None):
                    if name == "emu3_jax.cli.main":
                        press()
            sys.meta_path.insert(0, Finder())
            run = None
            import emu3_jax.__main__
            emu3_jax.__main__.program()
        """,
        "at the process' end": """
            import atexit
            def run(options):
                atexit.register(press)
        """,
    }.items(),
    ids=lambda case: case[0].replace(" ", "_"),
)
def test_a_signal_ends_a_command(tmp_path, code, number):
    call = "" if "program()" in code[1] else "start(run)"
    started = process(textwrap.dedent(code[1]) + call, number, cwd=tmp_path)
    assert ends(started) == ENDS[number]
    assert [path.name for path in tmp_path.iterdir() if path.name != "compiled.py"] == []


def test_sigterm_after_ctrl_c_ends_at_once(tmp_path):
    """As where a machine shuts down while a command cleans up. The first signal gives the line and the exit code."""
    code = """
        def run(options):
            try:
                press()
                time.sleep(60)
            finally:
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGTERM)
                while True:
                    try:
                        time.sleep(60)
                    except KeyboardInterrupt:
                        pass
        start(run)
    """
    assert ends(process(code, cwd=tmp_path)) == ENDS[signal.SIGINT]


def test_a_command_that_handles_sigterm_itself(tmp_path):
    """As `train` does: it may come twice, nothing is raised, and the process has all the time that it wants."""
    code = """
        from emu3_jax.cli import interruption
        interruption._PATIENCE = 0.2
        def run(options):
            signal.signal(signal.SIGTERM, lambda number, frame: print("came", flush=True))
            press()
            time.sleep(0.5)
            press()
            time.sleep(0.5)
            return 143
        start(run)
    """
    assert ends(process(code, signal.SIGTERM, cwd=tmp_path)) == (143, "came\ncame\n", "")


@both
def test_after_its_end_a_command_was_not_interrupted(tmp_path, number):
    code = """
        class Last:
            def __del__(self):
                os.kill(os.getpid(), NUMBER)
        def run(options):
            sys.last = Last()  # goes when the interpreter has ended
            print("done")
        start(run)
    """
    assert ends(process(code, number, cwd=tmp_path)) == (0, "done\n", "")


@both
def test_where_the_signal_is_ignored_it_stays_so(tmp_path, number):
    code = """
        signal.signal(NUMBER, signal.SIG_IGN)
        def run(options):
            press()
            print("done")
        start(run)
    """
    assert ends(process(code, number, cwd=tmp_path)) == (0, "done\n", "")


def test_other_errors_of_destructors_are_still_shown(tmp_path):
    code = """
        class Bad:
            def __del__(self):
                raise ValueError("x")
        def run(options):
            Bad()
        start(run)
    """
    code, _, err = ends(process(code, cwd=tmp_path))
    assert code == 0 and "ValueError: x" in err


@pytest.mark.slow
@both
@pytest.mark.parametrize("moment", ["compiling", "writing"])
def test_a_signal_ends_a_real_command(tmp_path, tiny_bundle, moment, number):
    """While XLA compiles, and while Orbax' threads write; nothing is in the output directory after either."""
    out = tmp_path / "out"
    words = {
        "compiling": ["generate", "a dot", "--model", str(tiny_bundle), "-o", str(out)],
        "writing": ["convert", str(tmp_path / "source"), "-o", str(out)],
    }[moment]
    if moment == "writing":
        from emu3_jax.checkpoints.export import export

        export(tiny_bundle, tmp_path / "source", "transformers", progress=False)
    call = f"sys.argv = {['emu3-jax', *words]!r}\nimport emu3_jax.__main__\nemu3_jax.__main__.program()"
    started = process(call, env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"})
    # The temporary directory is there before the first program is compiled. Its first files are there while the rest of
    # the decoder, and then the vision tokenizer, are still to be written: without a wait, a fast machine cannot finish.
    sign = ".emu3-tmp-*" if moment == "compiling" else ".emu3-tmp-*/*/*"
    while started.poll() is None and not list(tmp_path.glob(sign)):
        time.sleep(0.01)
    if moment == "compiling":
        time.sleep(0.2)
    started.send_signal(number)
    assert ends(started) == ENDS[number]
    assert not out.exists() and not list(tmp_path.glob(".emu3-tmp-*"))
