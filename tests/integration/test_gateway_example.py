import asyncio
import json
from uuid import UUID

import nats

from cluster.testing.load import Load, workload


async def our_gateway(urls, load):
    client = await nats.connect(list(urls), max_reconnect_attempts=-1)
    for line in load.lines:
        event = json.loads(line)
        subject = f"fi.events.{event['metadata']['site_id']}.{event['consultation_id']}"
        while UUID(event["event_id"]).bytes not in load.acknowledged:
            try:
                await client.jetstream().publish(subject, line, headers={"Nats-Msg-Id": event["event_id"]})
                load.acknowledge([UUID(event["event_id"]).bytes])
            except (nats.errors.Error, nats.js.errors.Error):
                await asyncio.sleep(0.1)
    await client.close()


async def test_our_gateway_loses_nothing_when_a_server_dies(fi_cluster):
    load = Load(workload(seed=1, events=300))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(our_gateway(fi_cluster.urls, load))
        await load.reached(100)
        await fi_cluster.kill("n1")
        await load.reached(200)
        await fi_cluster.start("n1")
    await fi_cluster.assert_whole(load)
