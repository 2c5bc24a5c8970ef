# SPDX-License-Identifier: MIT
"""Colours and a progress bar, both quiet where the output is no terminal."""

import os
import shutil
import sys
import time

COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ
WIDTH = min(shutil.get_terminal_size((100, 24)).columns, 110)


def paint(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m" if COLOUR else text


def bold(text):
    return paint(text, "1")


def dim(text):
    return paint(text, "2")


def green(text):
    return paint(text, "32")


def cyan(text):
    return paint(text, "36")


class Progress:
    """One line that redraws itself; where the output is no terminal, one line at the end."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done, self.start = label, total, 0, time.perf_counter()
        self.draw()

    def draw(self):
        if not sys.stdout.isatty():
            return
        share = self.done / self.total
        cells = int(share * 32 * 8)
        bar = ("█" * (cells // 8) + (" ▏▎▍▌▋▊▉"[cells % 8] if cells % 8 else "")).ljust(32)
        rate = self.done / max(time.perf_counter() - self.start, 1e-9)
        print(
            f"\r  {self.label:<34} {cyan(bar)} {share:4.0%} {dim(f'{rate:9,.0f} tokens/s')}",
            end="",
            flush=True,
        )

    def add(self, tokens: int):
        self.done += tokens
        self.draw()

    def close(self):
        seconds = time.perf_counter() - self.start
        line = (
            f"  {self.label:<34} {self.done:>9,} tokens {seconds:7.1f} s {self.done / seconds:9,.0f} tokens/s"
        )
        print(("\r\033[K" if sys.stdout.isatty() else "") + line)
