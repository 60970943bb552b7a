{{- define "cwg.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "cwg.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "cwg.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "cwg.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "cwg.selector" -}}
app.kubernetes.io/name: {{ include "cwg.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "cwg.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "cwg.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: gateway
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "cwg.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "cwg.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* "true" if there is, or may be, more than one gateway. */ -}}
{{- define "cwg.several" -}}
{{- if .Values.autoscaling.enabled -}}
{{- gt (int .Values.autoscaling.maxReplicas) 1 | ternary "true" "" -}}
{{- else -}}
{{- gt (int .Values.replicaCount) 1 | ternary "true" "" -}}
{{- end -}}
{{- end -}}

{{- /* Refuse values that cannot work, by what is missing and what to do. */ -}}
{{- define "cwg.check" -}}
{{- $secrets := .Values.secrets -}}
{{- if not $secrets.apiKey.name -}}
{{- fail "secrets.apiKey.name is empty: the gateway listens on all addresses of its pod, and does not do that without a key; name a Secret that has one" -}}
{{- end -}}
{{- if and (include "cwg.several" .) (not $secrets.storeUrl.name) -}}
{{- $asked := .Values.autoscaling.enabled | ternary (printf "autoscaling.maxReplicas is %d" (int .Values.autoscaling.maxReplicas)) (printf "replicaCount is %d" (int .Values.replicaCount)) -}}
{{- fail (printf "%s, but secrets.storeUrl.name is empty: several gateways need one PostgreSQL, because SQLite is for one process on one machine; name a Secret that has a postgresql:// URL, or set replicaCount to 1 and autoscaling.enabled to false" $asked) -}}
{{- end -}}
{{- if and $secrets.storeUrl.name (not $secrets.salts.name) -}}
{{- fail "secrets.salts.name is empty: with PostgreSQL the secret of the salts is not in a volume, and each pod would make its own; name a Secret that has 32 characters or more" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas is %d, more than maxReplicas, %d" (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- $elsewhere := dict
  "api_key" "secrets.apiKey" "store_url" "secrets.storeUrl" "engine_api_key" "secrets.engineApiKey"
  "kv_redis_url" "secrets.redisUrl" "s3_access_key_id" "secrets.s3" "s3_secret_access_key" "secrets.s3"
  "secret_file" "secrets.salts" "shutdown_grace_s" "shutdown.graceSeconds" "engines" "engines"
  "host" "service" "port" "service.port" "data_dir" "persistence or scratch" -}}
{{- range $name, $_ := .Values.settings -}}
{{- if hasKey $elsewhere $name -}}
{{- fail (printf "settings.%s is set by the chart: use %s" $name (get $elsewhere $name)) -}}
{{- end -}}
{{- end -}}
{{- range $name, $_ := .Values.env -}}
{{- if hasPrefix "CWG_" $name -}}
{{- fail (printf "env.%s is a setting: use settings, or secrets" $name) -}}
{{- end -}}
{{- end -}}
{{- if not (or .Values.engines .Values.settings.engine_urls) -}}
{{- fail "there is no engine: set engines, or settings.engine_urls" -}}
{{- end -}}
{{- range list "engine_urls" "cache_url" -}}
{{- if and $.Values.engines (get $.Values.settings .) -}}
{{- fail (printf "engines and settings.%s are both set: list every engine in engines, with its cache" .) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.hosts is empty: name the host that clients use" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs is empty: name the Gateway that serves the route" -}}
{{- end -}}
{{- end -}}

{{- /* gateway.toml. JSON's strings, numbers, booleans and lists are TOML's. */ -}}
{{- define "cwg.toml" -}}
# Written by the chart; secrets are in the environment.
shutdown_grace_s = {{ .Values.shutdown.graceSeconds }}
{{- if .Values.secrets.salts.name }}
secret_file = "/etc/cwg/secret/salts"
{{- end }}
{{- range $name, $value := .Values.settings }}
{{ $name }} = {{ mustToJson $value }}
{{- end }}
{{- range .Values.engines }}

[[engines]]
{{- range $name, $value := . }}
{{ $name }} = {{ mustToJson $value }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* The port of a URL, or of HOST:PORT. */ -}}
{{- define "cwg.port" -}}
{{- $written := regexFind ":[0-9]+(/|$)" . | trimAll ":/" -}}
{{- $written | default (hasPrefix "https:" . | ternary "443" "80") -}}
{{- end -}}

{{- /* The ports of engines and their caches, with spaces in between, each once. */ -}}
{{- define "cwg.enginePorts" -}}
{{- $ports := list -}}
{{- $settings := .Values.settings -}}
{{- $urls := kindIs "string" $settings.engine_urls | ternary (splitList "," (toString $settings.engine_urls)) ($settings.engine_urls | default list) -}}
{{- range concat $urls (compact (list $settings.cache_url)) -}}
{{- $ports = append $ports (include "cwg.port" (trim .)) -}}
{{- end -}}
{{- range $pair := .Values.engines -}}
{{- range $name, $value := $pair -}}
{{- if hasSuffix "_port" $name -}}
{{- $ports = append $ports (toString (int $value)) -}}
{{- else -}}
{{- $ports = append $ports (include "cwg.port" $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $ports | uniq | sortAlpha | join " " -}}
{{- end -}}

{{- /* A rule of the NetworkPolicy: (list PEERS PORTS). */ -}}
{{- define "cwg.egress" -}}
- ports:
    {{- range index . 1 }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
  {{- with index . 0 }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
