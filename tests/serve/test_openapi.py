"""What fits the OpenAPI schema is answered as it says, what does not is refused, and nothing is an error of the server."""

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
from hypothesis import HealthCheck, settings  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from byrote.serve.api import make_app  # noqa: E402
from byrote.serve.config import ServeConfig  # noqa: E402
from tests.serve.served import KEY, Served  # noqa: E402

CONFIG = schemathesis.Config()
CONFIG.projects.default.phases.coverage.enabled = False  # hundreds of cases; `malformed` in test_server.py sends worse
SCHEMA = schemathesis.openapi.from_dict(make_app(ServeConfig(run="none", name="tiny"), None, None, lambda: None).openapi(), config=CONFIG)


def shorten(body: object) -> None:
    """Ask for the model that there is, and for a few tokens of it: what is wrong with a body remains."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = "tiny"
        if "max_completion_tokens" not in body and isinstance(body.setdefault("max_tokens", 2), int):
            body["max_tokens"] = min(body["max_tokens"], 2)


@SCHEMA.parametrize()
@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_the_one_that_the_schema_describes(case: "schemathesis.Case", served: Served) -> None:
    shorten(case.body)
    answer = case.call(base_url=served.url, headers={"authorization": f"Bearer {KEY}"})
    case.validate_response(answer, excluded_checks=[positive_data_acceptance])  # no schema tells which names and ids there are
    assert answer.status_code < 500
