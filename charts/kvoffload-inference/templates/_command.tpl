{{/* The server's command, a list of words in JSON. No shell reads it. */}}

{{- define "kvo.servedNames" -}}
{{- $named := .Values.vllm.args.servedModelName -}}
{{- $model := .Values.vllm.args.model -}}
{{- if $named }}{{ ternary (list $named) $named (kindIs "string" $named) | toJson -}}
{{- else }}{{ list (ternary (base $model) $model (hasPrefix "/" $model)) | toJson }}{{ end -}}
{{- end }}

{{- define "kvo.loraModules" -}}
{{- $modules := .Values.vllm.lora.modules -}}
{{- if kindIs "string" $modules }}{{ $modules = regexSplit "\\s+" (trim $modules) -1 }}{{ end -}}
{{- without $modules "" | toJson -}}
{{- end }}

{{- define "kvo.command" -}}
{{- $args := .Values.vllm.args -}}
{{- $words := list "kvoffload" "serve" $args.model -}}
{{- $words = concat $words (list "--served-model-name") (include "kvo.servedNames" . | fromJsonArray) -}}
{{- $words = concat $words (list "--port" (include "kvo.number" $args.port)) -}}
{{- $words = concat $words (list "--gpu-memory-utilization" (toString $args.gpuMemoryUtilization)) -}}
{{- $words = concat $words (list "--tensor-parallel-size" (include "kvo.number" $args.tensorParallelSize)) -}}
{{- $words = concat $words (list "--shutdown-timeout" (include "kvo.number" (add .Values.shutdown.drainSeconds .Values.shutdown.flushSeconds))) -}}
{{- with $args.maxModelLen }}{{ $words = concat $words (list "--max-model-len" (include "kvo.number" .)) }}{{ end -}}
{{- range $name, $flag := dict "enableChunkedPrefill" "enable-chunked-prefill" "enablePrefixCaching" "enable-prefix-caching" -}}
{{- $value := get $args $name -}}
{{- if kindIs "bool" $value }}{{ $words = append $words (ternary (print "--" $flag) (print "--no-" $flag) $value) }}{{ end -}}
{{- end -}}
{{- if $args.enforceEager }}{{ $words = append $words "--enforce-eager" }}{{ end -}}
{{- if .Values.vllm.lora.enable -}}
{{- $words = concat $words (list "--enable-lora" "--max-lora-rank" (include "kvo.number" .Values.vllm.lora.maxRank)) -}}
{{- with include "kvo.loraModules" . | fromJsonArray }}{{ $words = concat $words (list "--lora-modules") . }}{{ end -}}
{{- end -}}
{{- $words = concat $words (include "kvo.offloadFlags" . | fromJsonArray) (default list $args.extraArgs) -}}
{{- $literal := list -}}
{{- range $words }}{{ $literal = append $literal (include "kvo.literal" .) }}{{ end -}}
{{- toJson $literal -}}
{{- end }}

{{- define "kvo.offloadFlags" -}}
{{- $args := .Values.vllm.args -}}
{{- $ssd := include "kvo.ssdGb" . -}}
{{- $words := list -}}
{{- if not (include "kvo.offloads" .) }}{{ $words = list "--disable-kv-cache" }}{{ else -}}
{{- if ne ($ssd | float64) 0.0 -}}
{{- range include "kvo.nvmePaths" . | fromJsonArray }}{{ $words = concat $words (list "--nvme-path" .) }}{{ end -}}
{{- with $args.ssdAdmission }}{{ $words = concat $words (list "--ssd-admission" .) }}{{ end -}}
{{- with $args.ssdWriteGbPerDay }}{{ $words = concat $words (list "--ssd-write-gb-per-day" (toString .)) }}{{ end -}}
{{- end -}}
{{- $words = concat $words (list "--ssd-kv-offload-gb" $ssd "--dram-kv-offload-gb" (include "kvo.dramGb" .)) -}}
{{- if or $args.noResumeKvCache $args.noResumeKVCache }}{{ $words = append $words "--no-resume-kv-cache" }}{{ end -}}
{{- if or $args.resumeKvCache $args.resumeKVCache }}{{ $words = append $words "--resume-kv-cache" }}{{ end -}}
{{- if or $args.cleanObsoleteKvCache $args.cleanObsoleteKVCache }}{{ $words = append $words "--clean-obsolete-kv-cache" }}{{ end -}}
{{- if $args.disableGpuReuse }}{{ $words = append $words "--disable-gpu-reuse" }}{{ end -}}
{{- if $args.disableLongToken }}{{ $words = append $words "--disable-long-token" }}{{ end -}}
{{- end -}}
{{- toJson $words -}}
{{- end }}

{{- define "kvo.environment" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
# Block hashes must be the same after a restart; vLLM before 0.29 draws a seed for them otherwise.
- {name: PYTHONHASHSEED, value: "0"}
# The root is read-only and the user is in no passwd: what is cached or asked by name is here.
- {name: HOME, value: /home/kvoffload}
- {name: USER, value: kvoffload}
- {name: VLLM_USE_V1, value: {{ .Values.vllm.env.vllmUseV1 | quote }}}
- {name: VLLM_WORKER_MULTIPROC_METHOD, value: {{ .Values.vllm.env.vllmWorkerMultiprocMethod }}}
{{- with .Values.vllm.env.tiktokenEncodingsBase }}
- {name: TIKTOKEN_ENCODINGS_BASE, value: {{ include "kvo.literal" . | quote }}}
{{- end }}
{{- if and .Values.vllm.lora.enable .Values.vllm.lora.runtimeUpdates }}
- {name: VLLM_ALLOW_RUNTIME_LORA_UPDATING, value: "True"}
{{- end }}
{{- range $variable, $secret := dict "HF_TOKEN" "huggingface" "VLLM_API_KEY" "apiKey" }}
{{- if include (print "kvo.secret." $secret) $ }}
- name: {{ $variable }}
  valueFrom: {secretKeyRef: {{ include (print "kvo.secret." $secret) $ }}}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* {name, key} of the Secret, or nothing */}}
{{- define "kvo.secret.huggingface" -}}
{{- with .Values.huggingface -}}
{{- if or .existingSecret .token }}{{ dict "name" (.existingSecret | default (print (include "kvo.name" $) "-huggingface")) "key" .key | toJson }}{{ end -}}
{{- end -}}
{{- end }}

{{- define "kvo.secret.apiKey" -}}
{{- with .Values.apiKey -}}
{{- if or .existingSecret .value .generate }}{{ dict "name" (.existingSecret | default (print (include "kvo.name" $) "-api-key")) "key" .key | toJson }}{{ end -}}
{{- end -}}
{{- end }}
