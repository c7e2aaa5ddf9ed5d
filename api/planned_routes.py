"""The routes of this API, and the error for routes that are planned."""

import re
from collections.abc import Iterable, Sequence

from starlette.routing import Match, Route

from api.core.errors import InvalidValue

# Planned for later releases: a pattern for each feature, and the start of the sentence about it.
_JOB = r"/v1/fine_tuning/jobs/[^/]+"
PLANNED: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), feature)
    for pattern, feature in (
        (r"/v1/uploads(/.*)?", "Uploading in parts"),
        (r"/v1/fine_tuning/jobs/plan", "Planning a job"),
        (rf"{_JOB}/metrics", "The metrics series of a job"),
        (r"/v1/(chat/)?completions", "Chat with a fine-tuned model"),
        (r"/v1/webhook_(endpoints|event_types)(/.*)?", "Webhooks"),
        (r"/v1/organization/.*", "This part of the administration"),
    )
]


class RouteTable:
    """The application's routes, for error messages."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = list(routes)

    def verbs(self, path: str) -> set[str]:
        """The verbs that some route takes on `path`."""
        scope = {"type": "http", "path": path, "root_path": "", "method": "GET"}
        hits = (route for route in self.routes if route.matches(scope)[0] is not Match.NONE)
        return {verb for route in hits for verb in route.methods or ()}

    def paths(self) -> list[str]:
        """Every route as `VERB path`, sorted by path."""
        lines = ((route.path, verb) for route in self.routes for verb in route.methods or () if verb != "HEAD")
        return [f"{verb} {path}" for path, verb in sorted(lines)]


def find_planned(verb: str, path: str, routes: RouteTable) -> InvalidValue | None:
    """The error for a planned route; None for any other."""
    for pattern, feature in PLANNED:
        if pattern.fullmatch(path) and verb not in routes.verbs(path):
            return InvalidValue(
                f"{feature} ({verb} {path}) is planned and not offered by this release.", code="not_supported"
            )
    return None
