"""Completion of commands, options and configuration keys for bash, zsh and fish.

The scripts hold plain word lists, so a shell completes without starting Python.
"""

import argparse
from collections.abc import Mapping

from gnnpipe.arguments import build_parser
from gnnpipe.keys import all_keys

_BASH = """\
# gnnpipe completion bash > ~/.local/share/bash-completion/completions/gnnpipe
_gnnpipe() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} key words
    if [[ $cur == = || $prev == = ]]; then  # bash splits words at =
        key=$prev
        [[ $prev == = ]] && key=${{COMP_WORDS[COMP_CWORD-2]}}
        case $key in
{values}
        esac
        COMPREPLY=($(compgen -W "$words" -- "${{cur#=}}"))
        return
    fi
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{options}
    esac
    COMPREPLY=($(compgen -f -W "$words" -- "$cur"))
    [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
}}
complete -F _gnnpipe gnnpipe
"""
_ZSH = """\
#compdef gnnpipe
# gnnpipe completion zsh > ~/.zfunc/_gnnpipe, with ~/.zfunc in fpath; or source it
autoload -U +X bashcompinit && bashcompinit
"""


def completion_script(shell: str) -> str:
    """The script that a shell reads to complete ``gnnpipe``.

    Args:
        shell: one of ``arguments.SHELLS``.
    """
    if shell == "fish":
        return _fish()
    options = "\n".join(
        f'        {name}) words="{" ".join(words)}" ;;' for name, words in _words().items()
    )
    values = "\n".join(
        f'            {key.name}) words="{" ".join(key.choices)}" ;;'
        for key in all_keys()
        if key.choices
    )
    script = _BASH.format(commands=" ".join(_words()), options=options, values=values)
    return script if shell == "bash" else _ZSH + script


def _words() -> Mapping[str, list[str]]:
    """What may follow each command: its options, and the keys where it takes a configuration."""
    found = {}
    for name, command in _commands().items():
        actions = [action for action in command._actions if action.option_strings]
        words = [option for action in actions for option in action.option_strings]
        if any(action.dest == "arguments" for action in command._actions):
            words += [f"{key.name}=" for key in all_keys()]
        found[name] = words
    return found


def _commands() -> Mapping[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (commands,) = [
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return commands.choices


def _fish() -> str:
    lines = [
        "# gnnpipe completion fish > ~/.config/fish/completions/gnnpipe.fish",
        f'complete -c gnnpipe -n __fish_use_subcommand -f -a "{" ".join(_words())}"',
    ]
    for name, words in _words().items():
        condition = f"-n '__fish_seen_subcommand_from {name}'"
        flags = [word for word in words if word.startswith("--")]
        lines += [f"complete -c gnnpipe {condition} -l {flag[2:]}" for flag in flags]
        if keys := [word for word in words if word.endswith("=")]:
            lines.append(f'complete -c gnnpipe {condition} -a "{" ".join(keys)}"')
    return "\n".join(lines) + "\n"
