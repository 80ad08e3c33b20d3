"""Records commands in a terminal, and draws the recording as an animated SVG.

    python benchmarks/recording.py record
    python benchmarks/recording.py draw

`record` runs the commands below in a pseudo-terminal, and writes up to 60 screens of
each, with their times, to benchmarks/recording.json. The model is a small random Llama,
and the data are numbers in words, so this takes only a minute. The commands are the
same for any model. `draw` writes docs/assets/recording.svg, which plays these screens
in half a minute. The picture shortens pauses and changes nothing else.
"""

import argparse
import codecs
import fcntl
import html
import json
import os
import pathlib
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time

from qlora_jax.llm.models.tiny import save_tiny

ROOT = pathlib.Path(__file__).parent.parent
RECORDING = ROOT / "benchmarks/recording.json"
PICTURE = ROOT / "docs/assets/recording.svg"
COLUMNS, ROWS = 92, 24
COMMANDS = (
    "qlora-jax train --model llama --data numbers.jsonl --out run --steps 300 "
    "--learning-rate 1e-2",
    "qlora-jax generate --run run --prompt seventeen",
    "qlora-jax export --run run --for vllm --out served",
)
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
MAX_SCREENS = 60  # for each command
SECONDS = 9.0, 2.5, 4.0  # how long the output of each command plays, at most
# Control sequences, line breaks, or text without either.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+|\x1b")


class Screen:
    """The lines that a command has printed, and the position of the cursor."""

    def __init__(self):
        self.lines, self.row, self.column = [""], 0, 0

    def write(self, text: str) -> None:
        """Applies text with line breaks, carriage returns and cursor movements."""
        for part in _CONTROL.findall(text):
            if part == "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append("")
            elif part == "\r":
                self.column = 0
            elif part.startswith("\x1b"):
                if part.endswith("A"):
                    self.row = max(0, self.row - int(part[2:-1] or 1))
                elif part.endswith("K"):
                    self.lines[self.row] = self.lines[self.row][: self.column]
            else:
                line = self.lines[self.row].ljust(self.column)
                self.column += len(part)
                rest = line[self.column :]
                self.lines[self.row] = line[: self.column - len(part)] + part + rest

    def wrapped(self) -> list[str]:
        """Returns the lines as a terminal shows them."""
        return [part.rstrip() for line in self.lines for part in wrap(line.rstrip())]


def record_command(command: str, folder: pathlib.Path) -> list[tuple[float, list[str]]]:
    """Runs a command in a pseudo-terminal, and returns its screens with their times."""
    terminal, command_side = pty.openpty()
    size = struct.pack("4H", ROWS, COLUMNS, 0, 0)
    fcntl.ioctl(command_side, termios.TIOCSWINSZ, size)
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_jax_program", *shlex.split(command)[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=command_side,
        stdout=command_side,
        stderr=command_side,
        start_new_session=True,
    )
    os.close(command_side)
    decoder = codecs.getincrementaldecoder("utf-8")()
    screen, start, screens = Screen(), time.monotonic(), []
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # on Linux, the command has ended
            break
        if not data:  # the same on macOS
            break
        screen.write(decoder.decode(data))
        screens.append((time.monotonic() - start, screen.wrapped()))
    if process.wait():
        sys.exit(f"{command} failed:\n" + "\n".join(screen.wrapped()))
    # A progress bar changes more often than the picture can show.
    stride = -(-len(screens) // MAX_SCREENS)
    return [*screens[:-1:stride], screens[-1]]


def record() -> None:
    """Runs all commands, and writes their screens."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_tiny(folder / "llama")
        with (folder / "numbers.jsonl").open("w") as file:
            for number, words in enumerate(NUMBERS.split()):
                row = {"prompt": words, "completion": str(number)}
                file.write(json.dumps(row) + "\n")
        scenes = []
        for command in COMMANDS:
            screens = record_command(command, folder)
            scenes.append({"command": command, "screens": screens})
            RECORDING.write_text(json.dumps(scenes, indent=0, ensure_ascii=False))


def place_in_time(scenes: list[dict]) -> list[tuple[float, list[str]]]:
    """Returns the times at which the picture changes, and the lines that it then shows.

    Times are in seconds.
    """
    frames: list[tuple[float, list[str]]] = [(0.0, ["$"])]
    history: list[str] = []
    now = 1.0
    for scene, seconds in zip(scenes, SECONDS, strict=True):
        command = scene["command"]
        for length in range(0, len(command) + 1, 8):
            frames.append((now, [*history, *wrap(f"$ {command[:length]}")]))
            now += 0.06
        history += wrap(f"$ {command}")
        frames.append((now, history.copy()))
        now += 0.5
        # Shorten pauses, and then all gaps by the same factor.
        times = [0.0, *(x for x, _ in scene["screens"])]
        gaps = [min(b - a, seconds / 8) for a, b in zip(times, times[1:], strict=False)]
        factor = min(1.0, seconds / sum(gaps))
        for gap, (_, lines) in zip(gaps, scene["screens"], strict=True):
            now += gap * factor
            frames.append((now, history + lines))
        history += [*strip_end(scene["screens"][-1][1]), ""]
        now += 2.5
        frames.append((now, [*history, "$"]))
    return frames


def strip_end(lines: list[str]) -> list[str]:
    """Returns lines without the empty ones at the end."""
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines


def wrap(line: str) -> list[str]:
    """Returns the parts of a line that a terminal shows below each other."""
    return [line[i : i + COLUMNS] for i in range(0, max(len(line), 1), COLUMNS)]


def draw() -> None:
    """Writes the SVG: a text element for each line, shown while the line is there."""
    frames = place_in_time(json.loads(RECORDING.read_text()))
    end = frames[-1][0] + 3.0
    # 1. Keep the last of the frames that come within a tenth of a second.
    shown = [
        (time, strip_end(lines)[-ROWS:])
        for i, (time, lines) in enumerate(frames)
        if i + 1 == len(frames) or frames[i + 1][0] - time > 0.1 or lines == ["$"]
    ]
    # 2. For each row, find when each text appears and when it is replaced.
    starts: dict[int, tuple[float, str]] = {}
    texts: list[tuple[int, str, float, float]] = []
    for now, lines in [*shown, (end, [])]:
        for row in range(ROWS):
            text = lines[row] if row < len(lines) else ""
            start, old = starts.get(row, (now, ""))
            if row not in starts or text != old or now == end:
                if old:
                    texts.append((row, old, start, now))
                starts[row] = now, text
    # 3. Write one element for each text. Where animations are switched off, only those
    # of the last frame are visible (the class `h` hides the others).
    keyframes: dict[tuple[float, float], str] = {}
    elements = []
    for row, text, start, stop in texts:
        name = keyframes.setdefault((start, stop), f"k{len(keyframes)}")
        kind = "c" if text.startswith("$") else ""
        if stop < end:
            kind += " h"
        y = 30 + 18 * row
        elements.append(
            f'<text class="{kind.strip()}" y="{y}" style="animation-name:{name}">'
            f"{html.escape(text, quote=False)}</text>"
        )
    rules = []
    for (start, stop), name in keyframes.items():
        percents = [f"{100 * x / end:.2f}%" for x in (start, stop)]
        rule = f"{percents[0]}{{visibility:visible}}"
        if start:
            rule = "0%{visibility:hidden}" + rule
        if stop < end:
            rule += f"{percents[1]}{{visibility:hidden}}"
        rules.append(f"@keyframes {name}{{{rule}}}")
    width, height = 8.45 * COLUMNS + 32, 18 * ROWS + 26
    style = (
        "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',"
        "monospace;fill:#e6edf3;white-space:pre;animation:"
        + f"{end:.1f}s step-end infinite"
        "}.c{fill:#7ee787}.h{visibility:hidden}"
        "@media(prefers-reduced-motion:reduce){text{animation:none}}"
    )
    PICTURE.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}">'
        f"<style>{style}{''.join(rules)}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>'
        f'<g transform="translate(16)">{"".join(elements)}</g></svg>\n',
        "utf-8",
    )
    size = PICTURE.stat().st_size
    print(f"{PICTURE}: {size / 1000:.0f} kB, {end:.0f} s, {len(texts)} texts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["record", "draw"])
    globals()[parser.parse_args().step]()
