"""Push notification configs: webhooks of the run of a task, whose deliveries A2A defines.

The id of a config is the name of its webhook. Its token and its credentials are secret, and no
answer has them.
"""

from __future__ import annotations

from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import InvalidParamsError, TaskNotFoundError

from runlane.client import Client
from runlane.ids import new_id
from runlane.webhooks import Webhook, WebhookFormat, WebhookRun
from runlane_a2a.errors import refuse

PAGE_SIZE = 50


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
    made = pb.TaskPushNotificationConfig()
    made.CopyFrom(config)
    made.id = config.id or new_id()
    if not config.url:
        raise refuse(InvalidParamsError, "is missing", field=f"{at}url")
    run = WebhookRun(
        made.task_id,
        made.id,
        WebhookFormat.A2A,
        authorization=_authorization(config, at),
        notification_token=config.token,
    )
    created = await client.create_webhook(config.url, run=run)
    return _config(created.webhook)


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
