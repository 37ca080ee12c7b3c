{{/* The volumes of the SSD tier: one for each nvmePath, called kv-cache-0 and so on. */}}

{{- define "kvo.nvmePaths" -}}
{{- $paths := .Values.vllm.args.nvmePath -}}
{{- ternary (list $paths) $paths (kindIs "string" $paths) | toJson -}}
{{- end }}

{{/* which of kvCache.type it is; none without an SSD tier */}}
{{- define "kvo.cacheType" -}}
{{- $given := default dict .Values.resources -}}
{{- $resources := merge dict (default dict $given.limits) (default dict $given.requests) -}}
{{- if eq (include "kvo.ssdGb" . | float64) 0.0 -}}none
{{- else if .Values.kvCache.type }}{{ .Values.kvCache.type -}}
{{- else if hasKey $resources (default "" .Values.kvCache.devicePluginResource) -}}devicePlugin
{{- else -}}claimTemplate
{{- end -}}
{{- end }}

{{- define "kvo.kind" -}}
{{- $stays := has (include "kvo.cacheType" .) (list "claimTemplate" "existingClaim" "hostPath") -}}
{{- .Values.deployment.kind | default (ternary "StatefulSet" "Deployment" $stays) -}}
{{- end }}

{{/* Replicas that share a claim or a node's folder get a folder each, by the name that a StatefulSet's pod keeps. */}}
{{- define "kvo.folderOfPod" -}}
{{- $shared := has (include "kvo.cacheType" .) (list "existingClaim" "hostPath") -}}
{{- if and $shared (eq (include "kvo.kind" .) "StatefulSet") }}true{{ end -}}
{{- end }}

{{- define "kvo.cacheMounts" -}}
{{- if not (has (include "kvo.cacheType" .) (list "none" "devicePlugin")) }}
{{- range $i, $path := include "kvo.nvmePaths" . | fromJsonArray }}
- name: kv-cache-{{ $i }}
  mountPath: {{ $path | quote }}
  {{- if include "kvo.folderOfPod" $ }}
  subPathExpr: $(POD_NAME)
  {{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "kvo.claimSpec" -}}
accessModes: [{{ .Values.kvCache.accessMode }}]
{{- with .Values.kvCache.storageClassName }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests:
    storage: {{ include "kvo.volumeSize" . }}
{{- end }}

{{- define "kvo.cacheVolumes" -}}
{{- $type := include "kvo.cacheType" . }}
{{- if has $type (list "ephemeral" "existingClaim" "hostPath" "emptyDir") }}
{{- range $i, $path := include "kvo.nvmePaths" . | fromJsonArray }}
- name: kv-cache-{{ $i }}
  {{- if eq $type "ephemeral" }}
  ephemeral:
    volumeClaimTemplate:
      metadata:
        labels: {{- include "kvo.selector" $ | nindent 10 }}
        {{- with $.Values.kvCache.annotations }}
        annotations: {{- toYaml . | nindent 10 }}
        {{- end }}
      spec: {{- include "kvo.claimSpec" $ | nindent 8 }}
  {{- else if eq $type "existingClaim" }}
  persistentVolumeClaim:
    claimName: {{ index $.Values.kvCache.existingClaims $i | quote }}
  {{- else if eq $type "hostPath" }}
  hostPath:
    path: {{ index $.Values.kvCache.hostPaths $i | quote }}
    type: Directory
  {{- else }}
  emptyDir:
    sizeLimit: {{ include "kvo.volumeSize" $ }}
  {{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "kvo.claimTemplates" -}}
{{- range $i, $path := include "kvo.nvmePaths" . | fromJsonArray }}
- metadata:
    name: kv-cache-{{ $i }}
    labels: {{- include "kvo.selector" $ | nindent 6 }}
    {{- with $.Values.kvCache.annotations }}
    annotations: {{- toYaml . | nindent 6 }}
    {{- end }}
  spec: {{- include "kvo.claimSpec" $ | nindent 4 }}
{{- end }}
{{- end }}
