"""Completion in a shell. In: the argument parser. Out: a script to be sourced."""

import argparse

SHELLS = ("bash", "zsh", "fish")


def completion(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for one of SHELLS; what is no word of the program is completed as a path."""
    words = _words(parser)
    if shell == "fish":
        return "".join(
            [f"complete -c invprop -n __fish_use_subcommand -a '{' '.join(words)}'\n"]
            + [
                f"complete -c invprop -n '__fish_seen_subcommand_from {command}' "
                + (f"-l {flag[2:]}\n" if flag.startswith("--") else f"-s {flag[1:]}\n")
                for command, flags in words.items()
                for flag in flags
                if flag.startswith("-")
            ]
        )
    cases = "\n".join(
        f"    {command}) words='{' '.join(flags)}' ;;" for command, flags in words.items()
    )
    bash = f"""_invprop() {{
  local words='{" ".join(words)}' word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$word" in
{cases}
    esac
  done
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _invprop invprop
"""
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash if shell == "zsh" else bash


def _words(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Each command with its flags and the values that it takes."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found = {}
    for name, command in commands.choices.items():
        flags = [flag for action in command._actions for flag in action.option_strings]
        values = [
            value for action in command._actions if not action.option_strings
            for value in action.choices or ()
        ]  # fmt: skip
        found[name] = flags + values
    return found
