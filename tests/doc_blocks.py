"""The fenced blocks of a Markdown page, and what a comment above one says about running it.

<!-- test: skip because REASON -->   the next block is not run
<!-- test: with KEY=VALUE ... -->    its runs get these values besides
<!-- test: file NAME -->             it is the content of a file beside the page
<!-- test: status 2 -->              its last command ends with this status
<!-- test: prints -->                its lines are in what the block before has printed
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RUN = ("python", "console", "bash", "sh", "shell")
FENCE = re.compile(r"^( *)(```+)([\w-]*) *(.*)$")
DIRECTIVE = re.compile(r"^ *<!-- test: (skip because|with|file|status|prints) ?(.*?) *-->$")
COMMAND = re.compile(
    r"^ {4,}(\$ |python |torchrun |gnnpipe |make |pip |sbatch |ray |from \w|import )"
)


class Block(NamedTuple):
    """One fenced block."""

    page: Path
    line: int
    language: str
    text: str
    directives: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether a reader is meant to run it; ``skip`` does not change that."""
        return self.language in RUN and "file" not in self.directives


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page in order, each with the directives right above it."""
    directives: dict[str, str] = {}
    lines = enumerate(page.read_text("utf-8").splitlines(), 1)
    for number, line in lines:
        if found := DIRECTIVE.match(line):
            directives[found[1]] = found[2]
        elif "<!-- test:" in line:
            raise ValueError(f"{page}:{number}: no such directive: {line}")
        elif fence := FENCE.match(line):
            indent, mark, language, _ = fence.groups()
            body = []
            for _, inner in lines:
                if inner.strip() == mark:
                    break
                body.append(inner.removeprefix(indent))
            yield Block(page, number, language, "\n".join(body) + "\n", directives)
            directives = {}
        elif line.strip() and directives:
            raise ValueError(f"{page}:{number}: a directive stands above a block")


def commands_outside_blocks(page: Path) -> list[str]:
    """Indented lines that look like something to run; a fence makes them tested."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    return [line for line in text.splitlines() if COMMAND.match(line)]


def commands_of(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined, comments and prompts dropped."""
    lines = [line.removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
