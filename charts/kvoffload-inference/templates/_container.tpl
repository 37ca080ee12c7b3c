{{- define "kvo.mainContainer" -}}
- name: vllm-api
  image: {{ include "kvo.image" (list . .Values.image) | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command:
    {{- include "kvo.command" . | fromJsonArray | toYaml | nindent 4 }}
  env:
    {{- include "kvo.environment" . | nindent 4 }}
  {{- with .Values.extraEnvFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    - {name: http, containerPort: {{ include "kvo.number" .Values.vllm.args.port }}, protocol: TCP}
  {{- range $name, $probe := .Values.probes }}
  {{ $name }}Probe:
    httpGet: {path: /health, port: http}
    {{- toYaml $probe | nindent 4 }}
  {{- end }}
  lifecycle:
    preStop:
      exec:
        {{- if include "kvo.hasPostscript" . }}
        command: [/bin/sh, /etc/kvoffload/prestop.sh, "{{ int .Values.shutdown.preStopSeconds }}", "{{ int .Values.shutdown.postscriptSeconds }}"]
        {{- else }}
        command: [sleep, "{{ int .Values.shutdown.preStopSeconds }}"]
        {{- end }}
  securityContext: {{ include "kvo.mainSecurity" . }}
  resources:
    {{- include "kvo.resources" . | nindent 4 }}
  volumeMounts:
    {{- include "kvo.mounts" . | trim | nindent 4 }}
{{- end }}

{{- define "kvo.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/kvoffload}
- {name: shared-data, mountPath: {{ .Values.initContainer.sharedDataPath | quote }}}
{{- include "kvo.cacheMounts" . }}
{{- if .Values.volumes.dshm.enabled }}
- {name: dshm, mountPath: /dev/shm}
{{- end }}
{{- if .Values.modelImage.reference }}
- {name: model-image, mountPath: {{ .Values.modelImage.mountPath | quote }}, readOnly: true}
{{- end }}
{{- if .Values.vllm.lora.adapters.existingClaim }}
- {name: adapters, mountPath: {{ .Values.vllm.lora.adapters.path | quote }}, readOnly: true}
{{- end }}
{{- if include "kvo.hasPostscript" . }}
- {name: scripts, mountPath: /etc/kvoffload, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* a claim where one is named, else an emptyDir: one of .Values.volumes */}}
{{- define "kvo.folder" -}}
{{- if .existingClaim -}}
persistentVolumeClaim: {claimName: {{ .existingClaim | quote }}}
{{- else -}}
emptyDir: {{ ternary (dict "sizeLimit" .sizeLimit) dict (not (empty .sizeLimit)) | toJson }}
{{- end -}}
{{- end }}

{{- define "kvo.volumes" -}}
- name: tmp
  {{ include "kvo.folder" .Values.volumes.tmp }}
- name: home
  {{ include "kvo.folder" .Values.volumes.home }}
- name: shared-data
  {{ include "kvo.folder" .Values.volumes.sharedData }}
{{- include "kvo.cacheVolumes" . }}
{{- if .Values.volumes.dshm.enabled }}
- name: dshm
  emptyDir: {medium: Memory, sizeLimit: {{ include "kvo.shmSize" . }}}
{{- end }}
{{- if or (include "kvo.hasPrescript" .) (include "kvo.hasPostscript" .) }}
- name: scripts
  configMap: {name: {{ include "kvo.name" . }}-scripts}
{{- end }}
{{- with .Values.modelImage }}
{{- if .reference }}
- name: model-image
  image: {reference: {{ .reference | quote }}, pullPolicy: {{ .pullPolicy }}}
{{- end }}
{{- end }}
{{- with .Values.vllm.lora.adapters.existingClaim }}
- name: adapters
  persistentVolumeClaim: {claimName: {{ . | quote }}, readOnly: true}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
