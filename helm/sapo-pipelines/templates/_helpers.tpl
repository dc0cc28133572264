{{/* What several templates share. Names of objects are fixed: pipelines/cluster.py has compiled them into the packages. */}}

{{- define "sapo.labels" -}}
app.kubernetes.io/name: sapo-pipelines
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Metadata of a pod: component name as the argument `component`. Without a sidecar, or a Job in the mesh never ends. */}}
{{- define "sapo.podMetadata" -}}
{{- with .root.Values.kfp.multiUser -}}
annotations:
  sidecar.istio.io/inject: "false"
{{ end -}}
labels:
  {{- include "sapo.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- if .root.Values.kfp.multiUser }}
  sidecar.istio.io/inject: "false"
  {{- end }}
{{- end }}

{{/* What every pod of the chart has: no root, no token, no way to gain rights. Meets Kubernetes' `restricted` standard. */}}
{{- define "sapo.podSpec" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  {{- with .Values.podSecurityContext.runAsUser }}
  runAsUser: {{ int . }}
  {{- end }}
  {{- with .Values.podSecurityContext.runAsGroup }}
  runAsGroup: {{ int . }}
  {{- end }}
  {{- with .Values.podSecurityContext.fsGroup }}
  fsGroup: {{ int . }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "sapo.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{- define "sapo.tag" -}}
{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "sapo.kfpEndpoint" -}}
{{ .Values.kfp.endpoint | default (printf "http://ml-pipeline.%s.svc.cluster.local:8888" .Values.kfp.namespace) }}
{{- end }}

{{- define "sapo.storeEndpoint" -}}
{{- if .Values.store.endpoint -}}
{{ .Values.store.endpoint }}
{{- else if .Values.seaweedfs.enabled -}}
http://sapo-seaweedfs.{{ .Release.Namespace }}.svc.cluster.local:8333
{{- else -}}
http://seaweedfs.{{ .Values.kfp.namespace }}.svc.cluster.local:9000
{{- end -}}
{{- end }}

{{/* The port of the store's URL. */}}
{{- define "sapo.storePort" -}}
{{- $url := urlParse (include "sapo.storeEndpoint" .) -}}
{{ regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- end }}

{{/* The namespace of a store whose URL is a service's (it has .svc in it); empty for one outside the cluster. */}}
{{- define "sapo.storeNamespace" -}}
{{- $host := (urlParse (include "sapo.storeEndpoint" .)).host | splitList ":" | first -}}
{{- if regexMatch "^[^.]+\\.[^.]+\\.svc(\\.|$)" $host -}}
{{ index (splitList "." $host) 1 }}
{{- end -}}
{{- end }}

{{/* A stage's environment from secrets and the store's config map: the names are those of pipelines/cluster.py. */}}
{{- define "sapo.storeEnvironment" -}}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef: {name: sapo-store, key: accesskey, optional: true}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef: {name: sapo-store, key: secretkey, optional: true}
- name: AWS_ENDPOINT_URL
  valueFrom:
    configMapKeyRef: {name: sapo-store, key: endpoint}
- name: AWS_REGION
  valueFrom:
    configMapKeyRef: {name: sapo-store, key: region}
{{- end }}

{{/* The compiled pipelines as they are uploaded: {file name: text}, with this installation's registry and tag. */}}
{{- define "sapo.packages" -}}
{{- $packages := dict -}}
{{- $tagged := printf "ghcr\\.io/sapo-pipelines/([a-z0-9-]+):%s" (regexQuoteMeta .Chart.AppVersion) -}}
{{- $image := printf "ghcr.io/sapo-pipelines/${1}:%s" (include "sapo.tag" .) -}}
{{- range $path, $_ := .Files.Glob "files/packages/*.yaml" -}}
{{- $text := regexReplaceAll $tagged ($.Files.Get $path) $image | replace "ghcr.io/sapo-pipelines" $.Values.image.registry -}}
{{- $_ := set $packages (base $path) $text -}}
{{- end -}}
{{- toJson $packages -}}
{{- end }}

{{- define "sapo.pipelineNames" -}}
{{- $names := list -}}
{{- range $file, $_ := include "sapo.packages" . | fromJson -}}
{{- $names = append $names (trimSuffix ".yaml" $file) -}}
{{- end -}}
{{- $names | sortAlpha | join "," -}}
{{- end }}

{{/* Volumes and mounts of the pods that run a script of the chart and may speak to KFP. */}}
{{- define "sapo.scriptVolumes" -}}
- name: scripts
  configMap: {name: sapo-scripts}
- name: tmp
  emptyDir: {sizeLimit: 64Mi}
{{- if .Values.kfp.multiUser }}
- name: kfp-token
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 7200, audience: pipelines.kubeflow.org}
{{- end }}
{{- if .Values.kfp.caConfigMap }}
- name: kfp-ca
  configMap: {name: {{ .Values.kfp.caConfigMap }}}
{{- end }}
{{- end }}

{{- define "sapo.scriptMounts" -}}
- {name: scripts, mountPath: /scripts, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if .Values.kfp.multiUser }}
- {name: kfp-token, mountPath: /var/run/secrets/kubeflow/pipelines, readOnly: true}
{{- end }}
{{- if .Values.kfp.caConfigMap }}
- {name: kfp-ca, mountPath: /etc/kfp-ca, readOnly: true}
{{- end }}
{{- end }}

{{- define "sapo.scriptEnvironment" -}}
# The images are told not to look beside a script for what it imports.
- {name: PYTHONPATH, value: /scripts}
- {name: PYTHONDONTWRITEBYTECODE, value: "1"}
{{- if .Values.kfp.caConfigMap }}
- {name: SSL_CERT_FILE, value: /etc/kfp-ca/ca.crt}
{{- end }}
{{- end }}

{{/* Arguments with which both scripts reach KFP. */}}
{{- define "sapo.kfpArguments" -}}
- --endpoint={{ include "sapo.kfpEndpoint" . }}
{{- if .Values.kfp.multiUser }}
- --namespace={{ .Release.Namespace }}
- --token_file=/var/run/secrets/kubeflow/pipelines/token
{{- end }}
{{- end }}

{{/* The API version of MutatingAdmissionPolicy: as told, or what this Kubernetes has. */}}
{{- define "sapo.mutatingPolicyVersion" -}}
{{- $kubernetes := .Capabilities.KubeVersion.Version -}}
{{- if .Values.trainingPods.apiVersion -}}
{{ .Values.trainingPods.apiVersion }}
{{- else if semverCompare ">=1.36-0" $kubernetes -}}
admissionregistration.k8s.io/v1
{{- else if semverCompare ">=1.34-0" $kubernetes -}}
admissionregistration.k8s.io/v1beta1
{{- else if semverCompare ">=1.32-0" $kubernetes -}}
admissionregistration.k8s.io/v1alpha1
{{- else -}}
{{- fail (printf "trainingPods.enabled: Kubernetes %s has no MutatingAdmissionPolicy, 1.32 has; leave it off" $kubernetes) -}}
{{- end -}}
{{- end }}
