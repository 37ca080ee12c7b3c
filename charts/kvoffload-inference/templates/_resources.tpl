{{/* What the main container asks for. */}}

{{- define "kvo.gpuNames" -}}
{{- list .Values.gpuResource "nvidia.com/gpu" "amd.com/gpu" "gpu.intel.com/i915" "gpu.intel.com/xe" "otterscale.com/vgpu" | uniq | toJson -}}
{{- end }}

{{/* how many GPUs a map of resources names, nothing where it names none: (list $ map) */}}
{{- define "kvo.gpus" -}}
{{- $names := include "kvo.gpuNames" (index . 0) | fromJsonArray -}}
{{- $counts := list -}}
{{- range $name, $count := index . 1 -}}
{{- if or (has $name $names) (hasPrefix "nvidia.com/mig-" $name) }}{{ $counts = append $counts $count }}{{ end -}}
{{- end -}}
{{- if eq (len $counts) 1 }}{{ first $counts }}{{ else if $counts }}{{ $sum := 0 }}{{ range $counts }}{{ $sum = addf $sum . }}{{ end }}{{ $sum }}{{ end -}}
{{- end }}

{{- define "kvo.resources" -}}
{{- $resources := default dict .Values.resources -}}
{{- $requests := deepCopy (default dict $resources.requests) -}}
{{- $limits := deepCopy (default dict $resources.limits) -}}
{{- $named := print (include "kvo.gpus" (list . $requests)) (include "kvo.gpus" (list . $limits)) -}}
{{- if and .Values.gpuResource (not $named) (not .Values.resourceClaims) -}}
{{- $_ := set $requests .Values.gpuResource (int .Values.vllm.args.tensorParallelSize) -}}
{{- $_ := set $limits .Values.gpuResource (int .Values.vllm.args.tensorParallelSize) -}}
{{- end -}}
{{- if not (hasKey $requests "memory") -}}
{{- $_ := set $requests "memory" (get $limits "memory" | default (include "kvo.memory" .)) -}}
{{- end -}}
{{- if and .Values.hostMemory.limit (not (hasKey $limits "memory")) }}{{ $_ := set $limits "memory" $requests.memory }}{{ end -}}
{{- if and (eq (include "kvo.cacheType" .) "emptyDir") (not (hasKey $requests "ephemeral-storage")) -}}
{{- $volumes := include "kvo.nvmePaths" . | fromJsonArray | len -}}
{{- $_ := set $requests "ephemeral-storage" (mulf (include "kvo.bytes" (include "kvo.volumeSize" .) | float64) $volumes | include "kvo.gi") -}}
{{- end -}}
{{- $made := omit (deepCopy $resources) "requests" "limits" -}}
{{- $_ := set $made "requests" $requests -}}
{{- $_ := set $made "limits" $limits -}}
{{- if and .Values.resourceClaims (not (hasKey $made "claims")) -}}
{{- $claims := list -}}
{{- range .Values.resourceClaims }}{{ $claims = append $claims (dict "name" .name) }}{{ end -}}
{{- $_ := set $made "claims" $claims -}}
{{- end -}}
{{- toYaml $made -}}
{{- end }}

{{- define "kvo.graceSeconds" -}}
{{- $stop := .Values.shutdown -}}
{{- $least := include "kvo.leastGrace" . | int -}}
{{- if kindIs "invalid" $stop.gracePeriodSeconds }}{{ add $least 10 }}{{ else }}{{ int $stop.gracePeriodSeconds }}{{ end -}}
{{- end }}

{{- define "kvo.leastGrace" -}}
{{- $stop := .Values.shutdown -}}
{{- add $stop.preStopSeconds (ternary $stop.postscriptSeconds 0 (not (empty (include "kvo.hasPostscript" .)))) $stop.drainSeconds $stop.flushSeconds -}}
{{- end }}
