"""One confirmed, persistent message, with pika and nothing else."""

import os
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["BENCHMARK_URL"]))
channel = connection.channel()
channel.confirm_delivery()
channel.basic_publish(
    "", sys.argv[1], sys.argv[2].encode(), pika.BasicProperties(delivery_mode=2), mandatory=True
)
connection.close()
