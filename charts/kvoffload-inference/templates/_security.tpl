{{/* Who the pod runs as, and what it may do. What the user gives is merged over it. */}}

{{- define "kvo.podSecurity" -}}
{{- $root := eq (include "kvo.cacheType" .) "devicePlugin" -}}{{- /* what a device plugin mounts belongs to root */ -}}
{{- $user := ternary 0 1000 $root -}}
{{- $seccomp := dict "type" "RuntimeDefault" -}}
{{- $made := dict "runAsNonRoot" (not $root) "runAsUser" $user "runAsGroup" $user "fsGroup" $user "fsGroupChangePolicy" "OnRootMismatch" "seccompProfile" $seccomp -}}
{{- mergeOverwrite $made (deepCopy (default dict .Values.podSecurityContext)) | toJson -}}
{{- end }}

{{- define "kvo.hardened" -}}
{{- dict "allowPrivilegeEscalation" false "readOnlyRootFilesystem" true "capabilities" (dict "drop" (list "ALL")) | toJson -}}
{{- end }}

{{- define "kvo.mainSecurity" -}}
{{- mergeOverwrite (include "kvo.hardened" . | fromJson) (deepCopy (default dict .Values.securityContext)) | toJson -}}
{{- end }}

{{- define "kvo.hasPrescript" -}}
{{- if and .Values.initContainer.enabled (trim (default "" .Values.prescript)) }}true{{ end -}}
{{- end }}

{{- define "kvo.hasPostscript" -}}
{{- if trim (default "" .Values.postscript) }}true{{ end -}}
{{- end }}

{{- define "kvo.prescriptSecurity" -}}
{{- if .Values.initContainer.privileged -}}
{{- dict "privileged" true "runAsUser" 0 "runAsGroup" 0 "runAsNonRoot" false | toJson -}}
{{- else -}}
{{- include "kvo.hardened" . -}}
{{- end -}}
{{- end }}
