"""`python -m docs.generate`: write everything that the code knows into the documents.

Exit code 1 when something is left that only a person can write; it is printed where and what.
"""

import sys

from docs.generate import everything, methods
from lorainit.config.rates import MissingRates


def main() -> int:
    """Write what has changed, and name what is left to write."""
    try:
        everything.new_pages()
        files = everything.files()
    except MissingRates as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    for path, text in files.items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path.relative_to(everything.ROOT)}")  # noqa: T201 - this is the command line
    left = methods.find_unwritten(everything.METHODS)
    for sentence in left:
        print(sentence, file=sys.stderr)  # noqa: T201
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
