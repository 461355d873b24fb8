"""Reads manifests from standard input, checks each against the schemas of the Kubernetes API, and compares them with what Helm makes
of the chart in the folder that is the first argument, with the values that are the second. Prints them as a JSON list."""

import json
import sys

import kubernetes_validate
import yaml

# The oldest version that the chart is for, and a recent one.
VERSIONS = ["1.27", "1.37"]


def documents(text):
    found = [document for document in yaml.safe_load_all(text) if document]
    return sorted(found, key=lambda document: (document["kind"], document["metadata"]["name"]))


def rendered(folder, values):
    try:
        from helm_python import chart
    except ImportError:
        return None
    report = chart.lint(folder, values, strict=True, namespace="twistlock")
    assert not report["errors"], report
    files = chart.Chart.load(folder).render(values, name="any", namespace="twistlock")
    return documents("\n---\n".join(files.values()))


manifests = documents(sys.stdin.read())
for manifest in manifests:
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)
by_helm = rendered(sys.argv[1], json.loads(sys.argv[2]))
assert by_helm is None or by_helm == manifests, f"Helm makes something else of the chart:\n{by_helm}\n{manifests}"
print("" if by_helm else "helm-python-sdk is not there: not compared", file=sys.stderr)
print(json.dumps(manifests))
