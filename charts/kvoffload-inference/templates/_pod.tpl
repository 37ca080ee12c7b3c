{{/* The pod, the same for StatefulSet and Deployment. */}}

{{- define "kvo.pod" -}}
metadata:
  labels:
    {{- include "kvo.labels" . | nindent 4 }}
    app.kubernetes.io/component: server
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/scripts: {{ list (default "" .Values.prescript) (default "" .Values.postscript) | toJson | sha256sum }}
    checksum/secrets: {{ list (default "" .Values.huggingface.token) (default "" .Values.apiKey.value) | toJson | sha256sum | trunc 8 | quote }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- with include "kvo.placement" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  serviceAccountName: {{ include "kvo.serviceAccountName" . | quote }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "kvo.graceSeconds" . }}
  securityContext: {{ include "kvo.podSecurity" . }}
  {{- with include "kvo.initContainers" . | trim }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    {{- include "kvo.mainContainer" . | nindent 4 }}
    {{- with .Values.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "kvo.volumes" . | trim | nindent 4 }}
  {{- with .Values.resourceClaims }}
  resourceClaims:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "kvo.placement" -}}
{{- range $key := list "schedulerName" "priorityClassName" "runtimeClassName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "imagePullSecrets" }}
{{- with get $.Values $key }}
{{ $key }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "kvo.initContainers" -}}
{{- if .Values.kvCache.fixPermissions }}
{{- $user := include "kvo.podSecurity" . | fromJson }}
- name: fix-permissions
  image: {{ include "kvo.image" (list . .Values.image) | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: {{ concat (list "chown" (printf "%s:%s" (include "kvo.number" $user.runAsUser) (include "kvo.number" $user.runAsGroup))) (include "kvo.nvmePaths" . | fromJsonArray) | toJson }}
  env:
    - name: POD_NAME
      valueFrom: {fieldRef: {fieldPath: metadata.name}}
  securityContext:
    runAsUser: 0
    runAsNonRoot: false
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL], add: [CHOWN]}
  resources: {{ toJson .Values.initContainer.resources }}
  volumeMounts:
    {{- include "kvo.cacheMounts" . | trim | nindent 4 }}
{{- end }}
{{- with .Values.extraInitContainers }}
{{ toYaml . }}
{{- end }}
{{- if include "kvo.hasPrescript" . }}
- name: prescript
  image: {{ include "kvo.image" (list . .Values.initContainer.image) | quote }}
  imagePullPolicy: {{ .Values.initContainer.image.pullPolicy }}
  command: [/bin/sh, /etc/kvoffload/prescript.sh]
  securityContext: {{ include "kvo.prescriptSecurity" . }}
  resources: {{ toJson .Values.initContainer.resources }}
  volumeMounts:
    - {name: scripts, mountPath: /etc/kvoffload, readOnly: true}
    - {name: shared-data, mountPath: {{ .Values.initContainer.sharedDataPath | quote }}}
    {{- if not .Values.initContainer.privileged }}
    - {name: tmp, mountPath: /tmp}
    {{- end }}
{{- end }}
{{- end }}
