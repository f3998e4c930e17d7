{{- define "runlane.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "runlane.selector" -}}
app.kubernetes.io/name: runlane
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "runlane.labels" -}}
{{ include "runlane.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "runlane.probe" -}}
{{- if .root.Values.tlsSecret -}}
exec:
  command:
    # The certificate names the address of the pod, which only a shell expands here.
    - sh
    - -c
    - exec runlane-server health --tls-ca /etc/runlane-tls/ca.crt --service={{ .service | quote }} "$POD_IP:50051"
{{- else -}}
grpc:
  port: 50051
  {{- with .service }}
  service: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
