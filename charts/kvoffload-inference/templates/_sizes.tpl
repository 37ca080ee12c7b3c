{{/* Sizes, as numbers of bytes in text: take them with float64. A GB is 10^9 bytes, a Gi 2^30. */}}

{{- define "kvo.bytes" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9.]+([eE][+]?[0-9]+)?" $text -}}
{{- $units := dict "m" 1e-3 "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 -}}
{{- $unit := get $units (trimPrefix $number $text) -}}
{{- if or (not $number) (kindIs "string" $unit) -}}
{{- fail (printf "%s is not an amount that this chart understands: write it like 64Gi" $text) -}}
{{- end -}}
{{- mulf (float64 $number) $unit -}}
{{- end }}

{{- define "kvo.gi" -}}
{{- printf "%.0fGi" (divf (float64 .) 1073741824.0 | ceil) -}}
{{- end }}

{{/* a value of vllm.args by either of its spellings: (list $ "ssdKvOffloadGb" "ssdKVOffloadGb" default) */}}
{{- define "kvo.either" -}}
{{- $args := (index . 0).Values.vllm.args -}}
{{- $name := index . 1 -}}
{{- $other := index . 2 -}}
{{- $given := get $args $name -}}
{{- $too := get $args $other -}}
{{- $isGiven := not (or (kindIs "invalid" $given) (kindIs "string" $given)) -}}
{{- $isGivenToo := not (or (kindIs "invalid" $too) (kindIs "string" $too)) -}}
{{- if and $isGiven $isGivenToo (ne (float64 $given) (float64 $too)) -}}
{{- fail (printf "vllm.args.%s is %v and vllm.args.%s is %v: they are one setting, leave one of them out" $name $given $other $too) -}}
{{- end -}}
{{- if $isGiven }}{{ $given }}{{ else if $isGivenToo }}{{ $too }}{{ else }}{{ index . 3 }}{{ end -}}
{{- end }}

{{- define "kvo.offloads" -}}
{{- if not (or .Values.vllm.args.disableKvCache .Values.vllm.args.disableKVCache) }}true{{ end -}}
{{- end }}

{{- define "kvo.dramGb" -}}
{{- if include "kvo.offloads" . }}{{ include "kvo.either" (list . "dramKvOffloadGb" "dramKVOffloadGb" 0) }}{{ else }}0{{ end -}}
{{- end }}

{{- define "kvo.ssdGb" -}}
{{- if include "kvo.offloads" . }}{{ include "kvo.either" (list . "ssdKvOffloadGb" "ssdKVOffloadGb" 500) }}{{ else }}0{{ end -}}
{{- end }}

{{/* workers of vLLM: a data-parallel one has more GPUs than tensorParallelSize says */}}
{{- define "kvo.ranks" -}}
{{- $named := include "kvo.gpus" (list . (default dict (default dict .Values.resources).limits)) | int -}}
{{- max $named (int .Values.vllm.args.tensorParallelSize) -}}
{{- end }}

{{/* what the tiers take of host memory: the DRAM tier, or without it the pool that blocks pass through to the SSD */}}
{{- define "kvo.tierBytes" -}}
{{- $dram := mulf (include "kvo.dramGb" . | float64) 1e9 -}}
{{- $pool := mulf 2.5e9 (include "kvo.ranks" .) -}}
{{- if $dram }}{{ $dram }}{{ else if ne (include "kvo.ssdGb" . | float64) 0.0 }}{{ $pool }}{{ else }}0{{ end -}}
{{- end }}

{{- define "kvo.shmSize" -}}
{{- .Values.volumes.dshm.sizeLimit | default (printf "%dGi" (include "kvo.ranks" . | mul 2 | add 6)) -}}
{{- end }}

{{/* What the scheduler keeps of each block on the SSD, some 460 bytes of blocks that mostly are larger than 460 kB. How much is free
on a drive that the chart does not make is not known: 4 TB, unless kvCache.size says. */}}
{{- define "kvo.indexBytes" -}}
{{- $gb := include "kvo.ssdGb" . | float64 -}}
{{- $whole := mulf $gb 1e9 -}}
{{- if lt $gb 0.0 }}{{ $whole = mulf (include "kvo.bytes" (default "4T" .Values.kvCache.size) | float64) (include "kvo.nvmePaths" . | fromJsonArray | len) }}{{ end -}}
{{- mulf $whole 0.001 -}}
{{- end }}

{{- define "kvo.memory" -}}
{{- $shm := ternary (include "kvo.shmSize" .) "0" .Values.volumes.dshm.enabled -}}
{{- $perGpu := mulf (include "kvo.bytes" .Values.hostMemory.perGpu | float64) (include "kvo.ranks" .) -}}
{{- $own := addf (include "kvo.bytes" .Values.hostMemory.base | float64) $perGpu -}}
{{- addf $own (include "kvo.tierBytes" . | float64) (include "kvo.indexBytes" . | float64) (include "kvo.bytes" $shm | float64) | include "kvo.gi" -}}
{{- end }}

{{/* Of each volume: its share of the cap, a tenth for the file system (reserved blocks, inodes, what stays free), and 1 GiB. */}}
{{- define "kvo.volumeSize" -}}
{{- $gb := include "kvo.ssdGb" . | float64 -}}
{{- if .Values.kvCache.size }}{{ .Values.kvCache.size }}{{ else if gt $gb 0.0 -}}
{{- $share := divf (mulf $gb 1e9) (include "kvo.nvmePaths" . | fromJsonArray | len) -}}
{{- addf (mulf $share 1.1) 1073741824.0 | include "kvo.gi" -}}
{{- end -}}
{{- end }}
