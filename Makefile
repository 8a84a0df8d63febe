# The project in a container. GPU=1 takes the CUDA image and all GPUs.
#
#   make build      make run [ARGS="--seeds 42 43 44"]      make test      make jupyter      make sh      make stop
IMAGE := p4_bert_vs_lora_vs_adapters
TAG := $(IMAGE)$(if $(GPU),:gpu)
IN := docker run --rm --init --shm-size 1g --volume "$(CURDIR)":/workspace $(if $(GPU),--gpus all)

.PHONY: build run test jupyter sh stop
build:
	docker build --tag $(TAG) --file $(if $(GPU),Dockerfile.gpu,Dockerfile) \
	  --build-arg UID="$$(id -u)" --build-arg GID="$$(id -g)" .
run:
	$(IN) --name $(IMAGE)_run $(TAG) bash run_all.sh $(ARGS)
test:
	$(IN) --name $(IMAGE)_test $(TAG) bash tests/run.sh $(ARGS)
jupyter:  # Jupyter prints the address, with the token that it asks for
	$(IN) --name $(IMAGE)_jupyter --publish 127.0.0.1:8888:8888 $(TAG) \
	  jupyter lab --ip 0.0.0.0 --port 8888 --no-browser comparison.ipynb
sh:
	$(IN) --name $(IMAGE)_sh --interactive --tty $(TAG) bash
stop:
	docker ps --quiet --filter name=^$(IMAGE)_ | xargs -r docker stop
