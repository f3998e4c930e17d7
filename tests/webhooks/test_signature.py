"""The signature of deliveries, checked by the reference implementation of Standard Webhooks."""

from __future__ import annotations

import time

import pytest
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from runlane_server.webhooks.signature import is_secret, new_secret, signed_headers

BODY = '{"type":"run.ended","text":"é"}'


def test_r55_the_reference_implementation_accepts_the_signature() -> None:
    secret = new_secret()
    headers = signed_headers([secret], "msg_1", int(time.time()), BODY.encode())
    Verifier(secret).verify(BODY, headers)
    for changed in (
        headers | {"webhook-id": "msg_2"},
        headers | {"webhook-timestamp": str(int(time.time()) - 1)},
    ):
        with pytest.raises(WebhookVerificationError):
            Verifier(secret).verify(BODY, changed)
    with pytest.raises(WebhookVerificationError):
        Verifier(secret).verify(BODY + " ", headers)
    with pytest.raises(WebhookVerificationError):
        Verifier(new_secret()).verify(BODY, headers)


def test_r55_two_secrets_are_valid_during_a_rotation() -> None:
    new, old = new_secret(), new_secret()
    headers = signed_headers([new, old], "msg_1", int(time.time()), BODY.encode())
    Verifier(new).verify(BODY, headers)
    Verifier(old).verify(BODY, headers)


@pytest.mark.parametrize(
    "text", ["", "whsec_", "whsec_c2hvcnQ=", "x" * 40, "whsec_" + "A" * 33, "whsec_" + "QUFB" * 30]
)
def test_a_secret_of_another_form_is_refused(text: str) -> None:
    assert is_secret(new_secret())
    assert not is_secret(text)
