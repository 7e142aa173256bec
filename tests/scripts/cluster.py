"""A Ray cluster on this machine in a process of its own, so that what Ray leaves open is not the tests'.

Prints its address, then for each line that it reads adds a node of one CPU and prints the process ids of that; ends
with its standard input.
"""

import json
import sys

from ray.cluster_utils import Cluster

STORE = 80 * 1024 * 1024  # bytes

if __name__ == "__main__":
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(json.dumps(cluster.address), flush=True)
    for _ in sys.stdin:
        node = cluster.add_node(num_cpus=1, object_store_memory=STORE)
        print(json.dumps([each.process.pid for group in node.all_processes.values() for each in group]), flush=True)
    cluster.shutdown()
