"""The model card of a model file: ``python scripts/runtimes model_card --out bundle/docs/model_card.md``.

The card is Markdown with the headings of CHAI's Applied Model Card, and a table of the items of TRIPOD+AI (Collins et
al., BMJ 2024;385:e078378). What it says comes from ``metadata.json``, from what is stored with the weights, and from
``metrics.json`` of an evaluation; what none of them tells is "not recorded".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from command_line import BUNDLE, UsageError, run_tool

from scripts.cohorts.files import write_text
from scripts.evaluation.case_metrics import MEASURES
from scripts.evaluation.case_table import describe_selection
from scripts.model.ensemble import KEEP_EPOCH
from scripts.model.errors import CheckpointError
from scripts.prediction.description import Model

TEMPLATE = "model_card.md.jinja"
NOT_RECORDED = "not recorded"


def model_card(
    out: str,
    bundle: str = str(BUNDLE),
    metrics: str | None = None,
    release: str = "research",
    contact: str = NOT_RECORDED,
) -> None:
    """Write the model card of a bundle's weights.

    Args:
        out: the file, Markdown.
        bundle: directory with configs/metadata.json and models/model.pt.
        metrics: metrics.json that scripts/evaluate_folds.py wrote of this model; by default the card has the metrics
            of the folds that are stored with the weights, and those of the metadata.
        release: stage of the release, in words.
        contact: whom to ask.
    """
    folder = Path(bundle).expanduser()
    metadata = json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))
    model = Model.of(folder / "models" / "model.pt")
    values = {"release": release, "contact": contact, "results": results(metadata, model.provenance, metrics)}
    write_text(out, card(metadata, model, values))
    print(f"written: {out}")


def card(metadata: Mapping[str, Any], model: Model, values: Mapping[str, Any]) -> str:
    """The text of the card."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # no HTML; what could be markup is replaced by `finalize`
        finalize=plain,
    )
    facts = dict(model.provenance)
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    template = environment.get_template(TEMPLATE)
    return template.render(metadata=metadata, model=model, facts=facts, versions=versions, **values)


def plain(value: Any) -> Any:
    """A value as text that neither ends a cell of a table nor becomes a tag; None and "" are "not recorded"."""
    if value is None or value == "":
        return NOT_RECORDED
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def results(metadata: Mapping[str, Any], provenance: Mapping[str, Any], metrics: str | None) -> list[dict[str, Any]]:
    """Tables of metrics: title, note, and rows of name, value with interval, and patients.

    The note states what was chosen on the cases of the table.

    Raises:
        UsageError: the file holds no metrics of an evaluation.
    """
    if metrics is not None:
        try:
            report = json.loads(Path(metrics).expanduser().read_text(encoding="utf-8"))
            title = f"Cross-validation: {report['held_out']} cases of {report['data']}"
            tables = [(title, report.get("selection"), report["pooled"]["metrics"])]
            if "external" in report:
                external = report["external"]
                title = f"Other cohort: {external['cases']} cases of {external['data']}"
                tables.append((title, external.get("selection"), external["metrics"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{metrics} is no metrics.json of scripts/evaluate_folds.py ({error})") from error
    else:
        chosen = describe_selection(provenance.get(KEEP_EPOCH), "validation")
        tables = [
            (
                f"Fold {fold['fold']}: {len_of(fold)} cases that it was not trained on",
                chosen,
                fold["metrics"]["validation"],
            )
            for fold in provenance.get("folds", [])
            if fold.get("metrics", {}).get("validation")
        ]
    made = [{"title": title, "note": note_on(chosen), "rows": rows_of(table)} for title, chosen, table in tables]
    stated = [
        {"name": name.replace("_", " "), "value": f"{value:g}", "patients": ""}
        for name, value in metadata.get("eval_metrics", {}).items()
    ]
    return made + ([{"title": "As stated in the metadata", "note": "", "rows": stated}] if stated else [])


def note_on(selection: Mapping[str, Any] | None) -> str:
    """What was chosen on the cases of a table, as a sentence; "" where nothing was."""
    if selection is None or selection["fitted_to_these_cases"] == []:
        return ""
    return f"{selection['statement'][0].upper()}{selection['statement'][1:]}."


def len_of(fold: Mapping[str, Any]) -> Any:
    """Number of cases that a fold was validated on."""
    return fold.get("cases", {}).get("validation", {}).get("cases", NOT_RECORDED)


def rows_of(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table of metrics."""
    rows = []
    for name, row in metrics.items():
        measure = MEASURES.get(name)
        digits = measure.digits if measure else 3
        value = f"none ({row.get('reason', NOT_RECORDED)})"
        if row.get("value") is not None:
            value = f"{row['value']:.{digits}f}"
            if row.get("low") is not None:
                value += f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        title = measure.title if measure else name.replace("_", " ")
        rows.append({"name": title, "value": value, "patients": row.get("patients", "")})
    return rows


if __name__ == "__main__":
    run_tool(model_card, CheckpointError, OSError)
