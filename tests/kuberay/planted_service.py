"""A RayService in the style of KubeRay's own samples, sound, and one with a fault planted."""

import textwrap

# As KubeRay's samples are written, with what they leave out for brevity.
SOUND = """\
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: rayservice-sample
spec:
  upgradeStrategy:
    type: NewCluster
  serveConfigV2: |
    applications:
      - name: fruit_app
        import_path: fruit.deployment_graph
        route_prefix: /fruit
        runtime_env:
          working_dir: "https://github.com/ray-project/test_dag/archive/78b4a5d.zip"
        deployments:
          - name: MangoStand
            num_replicas: 2
            max_replicas_per_node: 1
            user_config:
              price: 3
            ray_actor_options:
              num_cpus: 0.1
          - name: Model
            graceful_shutdown_timeout_s: 60
            autoscaling_config:
              min_replicas: 1
              max_replicas: 2
            ray_actor_options:
              num_gpus: 1
  rayClusterConfig:
    rayVersion: '2.60.0'
    enableInTreeAutoscaling: true
    autoscalerOptions:
      version: v2
    authOptions:
      mode: token
    gcsFaultToleranceOptions:
      redisAddress: redis:6379
      redisPassword:
        valueFrom:
          secretKeyRef:
            name: redis
            key: password
    headGroupSpec:
      serviceType: ClusterIP
      rayStartParams:
        num-cpus: '0'
      template:
        spec:
          containers:
          - name: ray-head
            image: rayproject/ray:2.60.0
            env:
            - name: RAY_SERVE_ENABLE_HA_PROXY
              value: "1"
            - name: RAY_SERVE_THROUGHPUT_OPTIMIZED
              value: "1"
            resources:
              limits:
                cpu: 2
                memory: 4Gi
            ports:
            - containerPort: 6379
              name: gcs-server
            - containerPort: 8265
              name: dashboard
            - containerPort: 10001
              name: client
            - containerPort: 8000
              name: serve
            - containerPort: 44217
              name: as-metrics
            - containerPort: 44227
              name: dash-metrics
    workerGroupSpecs:
    - groupName: small-group
      replicas: 1
      minReplicas: 1
      maxReplicas: 2
      rayStartParams: {}
      template:
        spec:
          terminationGracePeriodSeconds: 120
          tolerations:
          - key: nvidia.com/gpu
            operator: Exists
          containers:
          - name: ray-worker
            image: rayproject/ray:2.60.0
            env:
            - name: RAY_SERVE_ENABLE_HA_PROXY
              value: "1"
            - name: RAY_SERVE_THROUGHPUT_OPTIMIZED
              value: "1"
            lifecycle:
              preStop:
                exec:
                  command: ["python", "drain.py", "90"]
            resources:
              limits:
                cpu: "4"
                memory: "16Gi"
                nvidia.com/gpu: 1
            ports:
            - containerPort: 8000
              name: serve
"""


def planted(old: str, new: str, times: int = 1) -> str:
    """The sound one with a text replaced, which must be there just so often."""
    assert SOUND.count(old) == times, (SOUND.count(old), old)
    return SOUND.replace(old, new)


def line(text: str, part: str, nth: int = 1) -> int:
    """The number of the nth line with a part."""
    results = [number for number, each in enumerate(text.splitlines(), 1) if part in each]
    return results[nth - 1]


def document(text: str) -> str:
    return "---\n" + textwrap.dedent(text)
