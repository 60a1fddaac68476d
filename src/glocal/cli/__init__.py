"""The command line: ``glocal show``, ``glocal compare``, ``glocal papers``. Thin: each command calls the library."""

from __future__ import annotations


def main() -> None:
    """Run the command line; say what to install where its dependencies are missing."""
    try:
        from glocal.cli.app import app
    except ImportError as error:
        raise SystemExit(f"{error}. The command line needs more packages: pip install 'glocal[cli,plot,hf]'") from None
    app()
