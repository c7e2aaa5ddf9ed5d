"""`python -m docs.generate`: write everything that the code knows into the documents.

Exit code 1 when a page has a place that only a person can fill; its name is printed.
"""

import sys

from docs.generate import everything, methods


def main() -> int:
    """Write what has changed, and name what is left to write."""
    everything.new_pages()
    for path, text in everything.files().items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path.relative_to(everything.ROOT)}")  # noqa: T201 - this is the command line
    left = methods.unfinished(everything.METHODS)
    for page in left:
        print(f"{page} says 'To be written.': write it.", file=sys.stderr)  # noqa: T201
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
