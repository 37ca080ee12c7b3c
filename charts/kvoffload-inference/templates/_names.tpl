{{- define "kvo.name" -}}
{{- $release := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- .Values.deployment.name | default $release | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "kvo.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "kvo.labels" -}}
{{ include "kvo.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | replace "+" "_" | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* metadata of an object that is called NAME: (list $ "name") */}}
{{- define "kvo.metadata" -}}
{{- $root := index . 0 -}}
name: {{ index . 1 | quote }}
namespace: {{ $root.Release.Namespace | quote }}
labels:
  {{- include "kvo.labels" $root | nindent 2 }}
{{- end }}

{{- define "kvo.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "kvo.name" .) "default" .Values.serviceAccount.create) -}}
{{- end }}

{{/* reference of an image: (list $ .Values.image); its tag is the chart's appVersion where it names none */}}
{{- define "kvo.image" -}}
{{- $image := index . 1 -}}
{{- $tag := $image.tag | default (index . 0).Chart.AppVersion | toString -}}
{{- printf "%s%s%s" $image.repository (ternary "@" ":" (hasPrefix "sha256:" $tag)) $tag -}}
{{- end }}

{{/* Kubernetes replaces $(NAME) in commands and variables; what a user wrote stays as it is */}}
{{- define "kvo.literal" -}}
{{- . | toString | replace "$" "$$" -}}
{{- end }}

{{/* 8000 and not 8e+03: numbers of a values file are floating */}}
{{- define "kvo.number" -}}
{{- if eq (float64 .) (floor .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end }}
