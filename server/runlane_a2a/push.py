"""Push notification configs: webhooks of the run of a task, whose deliveries A2A defines.

The id of a config is the name of its webhook. Its token and its credentials are secret, and no
answer has them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import A2AError, InvalidParamsError, TaskNotFoundError

from runlane.client import Client
from runlane.errors import (
    ClientClosed,
    Internal,
    RunlaneError,
    UnexpectedStatus,
    is_outcome_unknown,
)
from runlane.ids import new_id
from runlane.webhooks import Webhook, WebhookFormat, WebhookRun
from runlane_a2a.errors import refuse

PAGE_SIZE = 50

_SENT = "configuration.taskPushNotificationConfig."
"""The config of a message."""


async def create_config(
    config: pb.TaskPushNotificationConfig, client: Client, *, at: str = ""
) -> pb.TaskPushNotificationConfig:
    """Creates a config, or replaces that of the same id.

    Args:
        config: The config. Without an id it gets one.
        client: The server as the caller sees it.
        at: The field of the request that the config is.

    Raises:
        A2AError, RunlaneError.
    """
    return _config(await _create(config, client, at))


@asynccontextmanager
async def pushed(
    params: pb.SendMessageRequest, task_id: str, client: Client
) -> AsyncGenerator[None, None]:
    """Creates the config that comes with a message; a message that is sent again replaces it.

    If the message is refused inside, the new config is deleted. Raises A2AError, RunlaneError.
    """
    webhook = await _create_sent(params, task_id, client)
    try:
        yield
    except (A2AError, RunlaneError) as error:
        if webhook is not None and _is_new(webhook) and _is_refusal(error):
            with suppress(RunlaneError):  # without a run it is deleted after an hour
                await client.delete_webhook(webhook.webhook_id)
        raise


def comes_with(params: pb.SendMessageRequest) -> bool:
    """Whether a config comes with a message."""
    return params.configuration.HasField("task_push_notification_config")


async def _create_sent(
    params: pb.SendMessageRequest, task_id: str, client: Client
) -> Webhook | None:
    if not comes_with(params):
        return None
    config = params.configuration.task_push_notification_config
    if config.tenant:
        raise refuse(
            InvalidParamsError, "the token decides it; leave it empty", field=f"{_SENT}tenant"
        )
    if config.task_id not in ("", task_id):
        raise refuse(InvalidParamsError, "is not that of the message", field=f"{_SENT}taskId")
    config.task_id = task_id
    config.id = config.id or task_id
    return await _create(config, client, _SENT)


def _is_refusal(error: A2AError | RunlaneError) -> bool:
    """Whether the message certainly had no effect."""
    if isinstance(error, A2AError) or not error.may_have_arrived:
        return True
    is_unknown = is_outcome_unknown(error)
    return not is_unknown and not isinstance(error, ClientClosed | Internal | UnexpectedStatus)


def _is_new(webhook: Webhook) -> bool:
    return webhook.created_at == webhook.updated_at


async def _create(config: pb.TaskPushNotificationConfig, client: Client, at: str) -> Webhook:
    if not config.url:
        raise refuse(InvalidParamsError, "is missing", field=f"{at}url")
    run = WebhookRun(
        config.task_id,
        config.id or new_id(),
        WebhookFormat.A2A,
        authorization=_authorization(config, at),
        notification_token=config.token,
    )
    return (await client.create_webhook(config.url, run=run)).webhook


async def delete_config(task_id: str, config_id: str, client: Client) -> None:
    """Deletes a config; one that does not exist too."""
    webhook = await _find(task_id, config_id, client)
    if webhook is not None:
        await client.delete_webhook(webhook.webhook_id)


async def get_config(task_id: str, config_id: str, client: Client) -> pb.TaskPushNotificationConfig:
    """Returns a config. Raises A2AError."""
    webhook = await _find(task_id, config_id, client)
    if webhook is None:
        raise refuse(TaskNotFoundError, "is that of no config of this task", field="id")
    return _config(webhook)


async def list_configs(
    params: pb.ListTaskPushNotificationConfigsRequest, client: Client
) -> pb.ListTaskPushNotificationConfigsResponse:
    """Returns a page of the configs of a task. Raises A2AError."""
    if params.page_size < 0:
        raise refuse(InvalidParamsError, "must be 0 or more", field="pageSize")
    pager = client.list_webhooks(run_id=params.task_id)
    configs = [_config(each) async for each in pager if _is_config(each)]
    start = _start(params.page_token, [each.id for each in configs])
    end = start + (params.page_size or PAGE_SIZE)
    more = configs[end:]
    return pb.ListTaskPushNotificationConfigsResponse(
        configs=configs[start:end], next_page_token=more[0].id if more else ""
    )


def _start(token: str, ids: list[str]) -> int:
    if not token:
        return 0
    if token not in ids:  # it may have been deleted
        raise refuse(InvalidParamsError, "is no token of this list", field="pageToken")
    return ids.index(token)


async def _find(task_id: str, config_id: str, client: Client) -> Webhook | None:
    async for webhook in client.list_webhooks(run_id=task_id):
        if _is_config(webhook) and webhook.run is not None and webhook.run.name == config_id:
            return webhook
    return None


def _is_config(webhook: Webhook) -> bool:
    return webhook.run is not None and webhook.run.format is WebhookFormat.A2A


def _authorization(config: pb.TaskPushNotificationConfig, at: str) -> str:
    scheme, credentials = config.authentication.scheme, config.authentication.credentials
    if not credentials:
        return ""  # the receiver expects a scheme, but gave nothing to send
    if not scheme:
        raise refuse(InvalidParamsError, "is missing", field=f"{at}authentication.scheme")
    return f"{scheme} {credentials}"


def _config(webhook: Webhook) -> pb.TaskPushNotificationConfig:
    run = webhook.run
    assert run is not None  # noqa: S101 - it was created for one
    made = pb.TaskPushNotificationConfig(id=run.name, task_id=run.run_id, url=webhook.url)
    if run.authorization:
        made.authentication.scheme = run.authorization
    return made
