"""docs/pictures: one drawing for each explanation. Places are in pixels, chosen by hand."""

from collections.abc import Callable, Mapping

from api.core.experiments import halving as schedule
from api.core.jobs.submit import PRIORITIES, Priority
from api.core.queue import scheduling
from docs.generate.svg import Drawing


def job() -> Drawing:
    """The states of a job and what moves it from one to the next."""
    drawing = Drawing("The life of a job", width=860, height=330)
    drawing.text(20, 28, "The life of a job", kind="bold")
    drawing.box(20, 60, "validating_files", "rows are checked")
    drawing.box(325, 60, "queued", "waits for its turn")
    drawing.box(645, 60, "running", "a worker has the lease", kind="accent")
    drawing.box(325, 160, "paused", "resume puts it back", kind="still")
    drawing.box(645, 160, "pausing", "writes a checkpoint", kind="still")
    drawing.box(20, 260, "cancelled", "from any open state", kind="bad")
    drawing.box(325, 260, "failed", "with a code and a reason", kind="bad")
    drawing.box(645, 260, "succeeded", "the adapter is compared", kind="good")
    drawing.arrow((170, 83), (323, 83))
    drawing.text(246, 76, "files are good", anchor="middle")
    drawing.arrow((475, 72), (643, 72))
    drawing.text(559, 65, "claimed: lease and token", anchor="middle")
    drawing.arrow((645, 94), (477, 94))
    drawing.text(559, 110, "worker lost or leaving", anchor="middle")
    drawing.arrow((670, 106), (670, 158))
    drawing.text(678, 138, "pause is asked for")
    drawing.arrow((645, 183), (477, 183))
    drawing.arrow((370, 160), (370, 108))
    drawing.text(362, 138, "resume", anchor="end")
    drawing.arrow((430, 106), (430, 158))
    drawing.text(438, 138, "pause")
    drawing.arrow((795, 83), (830, 83), (830, 283), (797, 283))
    drawing.text(822, 240, "trained", anchor="end")
    drawing.arrow((95, 106), (95, 283 - 50), (280, 233), (280, 283), (323, 283))
    drawing.text(103, 225, "files cannot be used")
    drawing.arrow((645, 100), (600, 126), (600, 283), (477, 283))
    drawing.text(592, 240, "fails", anchor="end")
    drawing.text(
        20, 324, "A failed job whose reason may pass can be resumed from its last checkpoint: it is queued again."
    )
    return drawing


def queue() -> Drawing:
    """Waiting, priority and fairness on one scale, for four jobs."""
    drawing = Drawing("Whose turn it is", width=720, height=232)
    drawing.text(20, 28, "Whose turn it is: the job that is due first", kind="bold")
    drawing.text(
        20,
        48,
        "due = when it was queued − its priority + its place among its project's running and waiting jobs, in hours",
    )
    for number, (due, name) in enumerate(sorted(_due(*waiting) for waiting in WAITING)):
        y, first = 66 + 34 * number, number == 0
        drawing.box(20, y, f"{number + 1}", width=28, height=24, kind="accent" if first else "still")
        drawing.text(58, y + 16, name)
        drawing.box(430, y, width=60 * (due + 4), height=24, kind="accent" if first else "still")
        drawing.text(438 + 60 * (due + 4), y + 16, f"{due:+.1f} h")
    drawing.text(
        20,
        222,
        "The hour is LORAINIT_PRIORITY_SECONDS. Every job moves forward while it waits, so none waits for ever.",
    )
    return drawing


# Project, hours waited, priority, its place among the jobs that its project runs or has waiting.
WAITING: tuple[tuple[str, float, Priority, int], ...] = (
    ("A", 3.0, "low", 1),
    ("B", 1.5, "normal", 1),
    ("B", 1.0, "normal", 2),
    ("C", 0.2, "high", 2),
)


def _due(project: str, waited: float, priority: Priority, place: int) -> tuple[float, str]:
    """Hours until the job is due, as `api.core.queue.scheduling` computes it with a step of one hour, and its name."""
    due = scheduling.compute_due_time(-waited - PRIORITIES[priority], place, 1.0)
    return due, f"project {project}, {priority} priority, waits {waited:g} h, place {place} of its project"


def service() -> Drawing:
    """The four programs and what they share."""
    drawing = Drawing("The programs and what they share", width=740, height=280)
    drawing.text(20, 28, "The programs and what they share", kind="bold")
    drawing.box(20, 130, "clients", "openai, curl, lorainit", kind="still")
    drawing.box(215, 50, "reconciler", "repairs and cleans up", width=140)
    drawing.box(215, 130, "API", "never loads torch", width=140)
    drawing.box(410, 50, "database", "jobs, events, metrics", kind="accent")
    drawing.box(410, 130, "broker", "“there is work”", kind="accent")
    drawing.box(410, 210, "storage", "files and adapters", kind="accent")
    drawing.box(615, 130, "worker", "claims, supervises", width=110)
    drawing.box(600, 220, "training process", "one for each run", width=130)
    drawing.arrow((170, 153), (213, 153))
    drawing.arrow((355, 73), (408, 73))
    drawing.arrow((355, 143), (408, 85))
    drawing.arrow((355, 153), (408, 153))
    drawing.arrow((355, 163), (408, 222))
    drawing.arrow((560, 153), (613, 153))
    drawing.arrow((615, 143), (562, 85))
    drawing.arrow((615, 163), (562, 222))
    drawing.arrow((665, 176), (665, 218))
    return drawing


def difference() -> Drawing:
    """Why a start that is not zero leaves the base model alone, and what is downloaded."""
    drawing = Drawing("Difference form", width=720, height=210)
    drawing.text(20, 28, "Difference form: a start B₀A₀ that is not zero, on an untouched base", kind="bold")
    drawing.box(20, 60, "start", "W + s(B₀A₀ − B₀A₀) = W", width=200, kind="still")
    drawing.box(
        260, 60, "training", "W + s(BA − B₀A₀)", "A and B move, W and B₀A₀ do not", width=210, height=60, kind="accent"
    )
    drawing.box(510, 60, "download, rank 2r", "[B  −B₀] · [A ; A₀]", width=190, kind="good")
    drawing.arrow((220, 83), (258, 83))
    drawing.arrow((470, 83), (508, 83))
    drawing.text(20, 150, "The start is the base model exactly, so nothing is lost before the first step.")
    drawing.text(
        20, 170, "The download is a plain LoRA: W itself is never changed, and nobody needs a converted base model."
    )
    drawing.text(20, 190, "A start of zero (B₀ = 0) needs no second part: there the download has rank r.")
    return drawing


def group() -> Drawing:
    """Several adapters in one forward pass."""
    drawing = Drawing("Jobs trained together", width=720, height=230)
    drawing.text(20, 28, "Jobs trained together: one process, one base model, one forward pass", kind="bold")
    for number, name in enumerate(("job 1", "job 2", "job 3")):
        y = 52 + 56 * number
        drawing.box(20, y, name, "its rows, its order", width=130)
        drawing.box(400, y, f"adapter {number + 1}", "its A and B, its optimizer", width=170, kind="accent")
        drawing.box(610, y, "its own end", width=95, kind="good")
        drawing.arrow((150, y + 23), (208, y + 23))
        drawing.arrow((340, y + 23), (398, y + 23))
        drawing.arrow((570, y + 23), (608, y + 23))
    drawing.box(
        210, 52, "frozen base model", "loaded once", "all rows in one pass", width=130, height=158, kind="still"
    )
    return drawing


def row() -> Drawing:
    """Which tokens of a chat row are trained."""
    drawing = Drawing("What is trained of a row", width=720, height=190)
    drawing.text(20, 28, "What is trained of a row", kind="bold")
    parts = (
        ("<|user|>", 70, "still"),
        ("Where is my order?", 150, "still"),
        ("<|assistant|>", 100, "still"),
        ("It leaves today.", 130, "good"),
        ("<|end|>", 70, "good"),
    )
    x = 20
    for words, width, kind in parts:
        drawing.box(x, 60, words, width=width, height=36, kind=kind)
        x += width + 6
    drawing.text(20, 116, "context: what a server sends before the answer", kind="small")
    drawing.text(358, 116, "trained: what the model would generate", kind="small")
    drawing.text(
        20,
        148,
        "The base model's chat template writes the text. An answer ends with the token at which the model stops.",
    )
    drawing.text(20, 168, "Messages with weight 0, system prompts, questions and answers of tools are context.")
    return drawing


def memory() -> Drawing:
    """How a step is cut into passes that fit."""
    drawing = Drawing("Fitting into memory", width=720, height=240)
    drawing.text(20, 28, "One step, cut into passes that fit", kind="bold")
    drawing.box(20, 60, "a step's rows", "batch_size", width=120, kind="still")
    drawing.box(180, 60, "passes of at most", "so many tokens each", width=150)
    drawing.box(370, 60, "the largest pass", "is tried before step 1", width=150, kind="accent")
    drawing.box(560, 60, "it fits", "the run begins", width=140, kind="good")
    drawing.arrow((140, 83), (178, 83))
    drawing.arrow((330, 83), (368, 83))
    drawing.arrow((520, 83), (558, 83))
    drawing.box(180, 160, "1. half the tokens", width=150, height=36)
    drawing.box(370, 160, "2. compute layers again", width=170, height=36)
    drawing.box(568, 160, "3. out_of_memory", width=140, height=36, kind="bad")
    drawing.arrow((445, 106), (445, 132), (255, 132), (255, 158))
    drawing.text(300, 126, "memory runs out")
    drawing.arrow((330, 178), (368, 178))
    drawing.arrow((540, 178), (566, 178))
    drawing.arrow((200, 160), (200, 108))
    drawing.text(
        20,
        226,
        "Rows, their order and what is minimized stay the same. Gradients of the passes are added up before the step.",
    )
    return drawing


def experts() -> Drawing:
    """Where the adapters of a mixture of experts lie."""
    drawing = Drawing("A mixture of experts", width=720, height=236)
    drawing.text(20, 28, "A mixture of experts: one LoRA for each expert's matrix", kind="bold")
    drawing.box(20, 100, "tokens", width=90, kind="still")
    drawing.box(150, 100, "router", "not adapted", width=110, kind="still")
    for number in range(3):
        y = 46 + 54 * number
        drawing.box(320, y, f"expert {number + 1}", "its matrices", width=120)
        drawing.box(480, y, "A and B of its own", width=150, kind="accent")
        drawing.arrow((260, 123), (318, y + 23))
        drawing.text(450, y + 28, "+", anchor="start", kind="bold")
    drawing.arrow((110, 123), (148, 123))
    drawing.text(
        20,
        226,
        "A token passes through the few experts that the router chooses. An expert without tokens has no gradient.",
    )
    return drawing


def export() -> Drawing:
    """How a download is compared with what was trained."""
    drawing = Drawing("How a download is proven", width=720, height=210)
    drawing.text(20, 28, "How a download is proven, before the first step and at the end", kind="bold")
    drawing.box(20, 60, "trained model", "our layers, base in memory", width=170, kind="accent")
    drawing.box(250, 60, "adapter files", "as they will be downloaded", width=180)
    drawing.box(490, 60, "stock PEFT", "on a fresh, untouched base", width=190)
    drawing.arrow((190, 83), (248, 83))
    drawing.arrow((430, 83), (488, 83))
    drawing.box(250, 145, "compared in float64", "every layer, then the logits", width=180)
    drawing.arrow((105, 106), (105, 168), (248, 168))
    drawing.arrow((585, 106), (585, 168), (432, 168))
    drawing.text(20, 200, "Equal: succeeded.")
    drawing.text(680, 200, "Different: export_check_failed, no adapter.", anchor="end")
    return drawing


def rounding() -> Drawing:
    """What bf16 loses of a small update."""
    drawing = Drawing("Where bf16 loses an adapter", width=720, height=180)
    drawing.text(20, 28, "Where bf16 loses an adapter: numbers of bf16 near 1", kind="bold")
    drawing.parts.append('<path d="M40 90H680" stroke="#6b7280"/>')
    for number in range(6):
        x = 60 + 120 * number
        drawing.parts.append(f'<path d="M{x} 82V98" stroke="#1d4ed8" stroke-width="2"/>')
        drawing.text(x, 116, f"{1 + number / 128:.4f}", anchor="middle")
    drawing.parts.append(
        '<circle cx="180" cy="90" r="5" fill="#15803d"/><circle cx="208" cy="90" r="5" fill="#b91c1c"/>'
    )
    drawing.text(180, 72, "W·x", anchor="middle")
    drawing.text(214, 72, "W·x + s·B·A·x")
    drawing.arrow((207, 98), (207, 132), (152, 132), (152, 96), (172, 92), kind="dashed")
    drawing.text(212, 138, "rounds back: the adapter's part is lost")
    drawing.text(
        20,
        168,
        "A sum is rounded to the nearest number. What is smaller than half the distance between two of them is lost.",
    )
    return drawing


def halving() -> Drawing:
    """How far each of 24 cells runs with `"schedule": "halving"`."""
    cells, left, width, top = 24, 40, 560, 76
    ends = (*schedule.RUNGS, 1.0)
    counts = schedule.list_counts(cells)
    drawing = Drawing("Halving: how far each of 24 cells runs", width=660, height=320)
    drawing.text(20, 28, "Halving: how far each of 24 cells runs", kind="bold")
    for number in range(cells):
        end = max(share for share, count in zip(ends, counts, strict=True) if number < count)
        kind = "good" if end == 1.0 else "still"
        drawing.box(left, top + 7 * number, width=width * end, height=5, kind=kind)
    for share, count in zip(ends, counts, strict=True):
        x = left + width * share
        drawing.text(x, top + 7 * cells + 20, f"{share:.0%}", anchor="middle")
        drawing.text(x - 6, 56, f"{count} run up to here" if share > 0.2 else f"{count}", anchor="end")
    drawing.text(left, top + 7 * cells + 38, "of the steps; the best cells are at the top")
    cost = schedule.find_cost(cells)
    drawing.text(
        20, 308, f"Together they cost {cost:.1f} whole runs instead of {cells}. Who is stopped keeps its checkpoint."
    )
    return drawing


DRAWINGS: Mapping[str, Callable[[], Drawing]] = {
    "job": job,
    "queue": queue,
    "service": service,
    "difference": difference,
    "group": group,
    "row": row,
    "memory": memory,
    "experts": experts,
    "export": export,
    "rounding": rounding,
    "halving": halving,
}
