"""A Ray cluster of two nodes on this machine, one CPU each: run as a program by test_nodes.py.

Prints the address of its GCS; loses the second node after "lose", gets another one after "add".
"""

import sys

from ray.cluster_utils import Cluster

MEMORY = 100 << 20

if __name__ == "__main__":
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False},
    )
    second = cluster.add_node(object_store_memory=MEMORY)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line == "lose\n":
            cluster.remove_node(second, allow_graceful=False)
        else:
            cluster.add_node(object_store_memory=MEMORY)
        print("done", flush=True)
    cluster.shutdown()
